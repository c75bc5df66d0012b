"""Generation with adapters: the latency of a first token and of each further one.

A batch of requests with prompts of one length, greedy decoding with a key-value cache. The base
model alone; one adapter for all; and 64 adapters, another one for each request.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import loraxs_kernels as lxk
from bench import train_methods
from bench.common import Timing, summary
from bench.train_methods import EAGER, EIGENTUNE, LORA, OURS
from bench.train_models import Subject

REQUESTS, PROMPT, NEW_TOKENS = 16, 16, 12
MANY = 64

#: (adapters, method)
Key = tuple[int, str]


def prompts(subject: Subject) -> Tensor:
    """Beginnings of text, int64 [16, 16]."""
    ids = torch.cat([batch["ids"].flatten() for batch in subject.text()])
    return ids[: REQUESTS * PROMPT].view(REQUESTS, PROMPT)


@torch.no_grad()
def decode(model: Any, ids: Tensor) -> tuple[Tensor, float, list[float]]:
    """The new tokens [requests, 12], seconds of the first, and of each further one."""
    made, seconds = [], []
    given, cache = ids, None
    for _ in range(NEW_TOKENS):
        started = time.perf_counter()
        out = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        given, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        seconds.append(time.perf_counter() - started)
        made.append(given)
    return torch.cat(made, 1), seconds[0], seconds[1:]


def _many(subject: Subject, single: nn.Module, rank: int) -> tuple[nn.Module, lxk.AdapterBatch]:
    """A model with 64 adapters, and who uses which; adapter 0 is that of ``single``."""
    model = subject.build()
    config = lxk.LoRAXSConfig(rank, target_modules=subject.targets, num_adapters=MANY, r_std=1e-2)
    lxk.inject_lora_xs(model, config)
    layers = (m for m in single.modules() if isinstance(m, lxk.LoRAXSLinear))
    with torch.no_grad():
        for many in (m for m in model.modules() if isinstance(m, lxk.LoRAXSLinear)):
            many.R[0] = next(layers).R
    ids = torch.arange(REQUESTS) * (MANY // REQUESTS)
    return model.eval(), lxk.AdapterBatch(ids, MANY)


def measure(subject: Subject, rank: int, *, rounds: int = 5) -> dict[Key, dict[str, Timing]]:
    """Time all in turns, ``rounds`` times after a warm-up.

    Returns:
        ``"first"`` and ``"next"``, seconds per token for the whole batch.

    Raises:
        RuntimeError: a request among 64 adapters is answered otherwise than with its adapter alone.
    """
    ids = prompts(subject)
    ours = train_methods.attach(OURS, subject, subject.build(), rank).model
    models: dict[Key, nn.Module] = {(0, "base model"): subject.build(), (1, OURS): ours}
    for method in (EAGER, LORA, EIGENTUNE):
        models[1, method] = train_methods.attach_alike(method, subject, ours, rank).model
    many, batch = _many(subject, ours, rank)
    models[MANY, OURS] = many
    contexts: dict[Key, Callable[[], Any]] = {(MANY, OURS): lambda: lxk.use_adapters(many, batch)}
    samples: dict[Key, dict[str, list[float]]] = {k: {"first": [], "next": []} for k in models}
    said: dict[Key, Tensor] = {}
    for turn in range(rounds + 1):
        keys = list(models)
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            with contexts.get(key, contextlib.nullcontext)():
                said[key], first, further = decode(models[key].eval(), ids)
            if turn:
                samples[key]["first"].append(first)
                samples[key]["next"] += further
    _check(said)
    return {
        key: {what: summary(values, 1) for what, values in found.items()}
        for key, found in samples.items()
    }


def _check(said: Mapping[Key, Tensor]) -> None:
    """Same cores, same words: eager and EigenTune as ours; and request 0 of 64 adapters."""
    want = said[1, OURS]
    for key in ((1, EAGER), (1, EIGENTUNE)):
        _compare(key, said[key], want)
    _compare((MANY, OURS), said[MANY, OURS][:1], want[:1])


def _compare(key: Key, got: Tensor, want: Tensor) -> None:
    # A tie between two words may fall either way: most requests have to agree in full.
    same = (got == want).all(1).double().mean().item()
    if same < 0.75:
        raise RuntimeError(f"{key}: only {same:.0%} of the requests are answered as by ours")


def as_json(found: Mapping[Key, Mapping[str, Timing]]) -> list[dict[str, Any]]:
    """A list of rows."""
    return [{"adapters": n, "method": m, **timings} for (n, m), timings in found.items()]


def rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of a table, from what :func:`as_json` wrote."""
    base = next(row for row in found if row["adapters"] == 0)
    return [
        [
            f"{row['adapters']}: {row['method']}",
            f"{1e3 * row['first']['median']:.0f}",
            f"{1e3 * row['next']['median']:.1f}",
            f"{row['first']['median'] / base['first']['median']:.2f}",
            f"{row['next']['median'] / base['next']['median']:.2f}",
        ]
        for row in found
    ]
