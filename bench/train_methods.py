"""The ways to adapt a model that ``bench_train`` compares, and one training step of each."""

from __future__ import annotations

import copy
import importlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import loraxs_kernels as lxk
from bench.train_models import Subject
from loraxs_kernels.demo.methods import EagerLoRAXSLinear

OURS, UNPACKED, EAGER, LORA, EIGENTUNE = (
    "ours", "ours, nothing packed", "eager", "PEFT LoRA", "EigenTune"
)  # fmt: skip
METHODS = (OURS, UNPACKED, EAGER, LORA, EIGENTUNE)
#: Those that compute the same function of the same core.
ALIKE = (OURS, UNPACKED, EAGER, EIGENTUNE)


@dataclass
class Adapted:
    """A model with an adapter; ``seconds``: what making it took (for LoRA-XS: the bases)."""

    subject: Subject
    model: nn.Module
    adapter: list[nn.Parameter]
    bases: list[Tensor]
    seconds: float
    _optimizer: torch.optim.Optimizer = field(init=False)
    _turn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(self, batches: Sequence[dict[str, Tensor]]) -> float:
        """Forward, backward and AdamW on the next batch; returns the loss."""
        batch = batches[self._turn % len(batches)]
        self._turn += 1
        loss = self.subject.loss(self.model, batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def sizes(self) -> dict[str, int]:
        """Bytes of what trains, of the frozen bases, and of the optimizer's states of the adapter
        (which exist after a step); without the head.
        """
        states = [self._optimizer.state[p] for p in self.adapter]
        held = (v for state in states for v in state.values() if isinstance(v, Tensor))
        return {
            "adapter": sum(p.nbytes for p in self.adapter),
            "bases": sum(t.nbytes for t in self.bases),
            "optimizer": sum(t.nbytes for t in held if t.dim()),
        }


def load_library(method: str) -> None:
    """Import what a method needs, so that no clock or memory count meets it."""
    if method == LORA:
        importlib.import_module("peft")
    elif method == EIGENTUNE:
        importlib.import_module("eigentune")


def attach(method: str, subject: Subject, model: nn.Module, rank: int) -> Adapted:
    """Adapt ``model`` in place, from its weights alone; the scaling is 1.

    The eager method takes this package's initializer: for the time that the official one takes see
    :func:`official_seconds`.
    """
    head = subject.head(model)
    load_library(method)
    started = time.perf_counter()
    if method == LORA:
        made = _lora(model, subject.targets, rank)
    elif method == EIGENTUNE:
        made = _eigentune(model, subject.targets, rank)
    else:
        made = lxk.inject_lora_xs(
            model,
            lxk.LoRAXSConfig(
                rank, target_modules=subject.targets, prepack=method != UNPACKED, r_std=1e-2
            ),
        )
    seconds = time.perf_counter() - started
    if method == EAGER:
        _make_eager(made)
    return _adapted(subject, made, head, seconds)


def attach_alike(method: str, subject: Subject, ours: nn.Module, rank: int) -> Adapted:
    """A copy of a model that :data:`OURS` adapted, run by another method.

    Frozen tensors are shared. Same cores, unless the method is LoRA.
    """
    frozen = [p for p in ours.parameters() if not p.requires_grad]
    shared = {id(t): t for t in itertools.chain(frozen, ours.buffers())}
    twin = copy.deepcopy(ours, shared)
    layers = {n: m for n, m in twin.named_modules() if isinstance(m, lxk.LoRAXSLinear)}
    if method == EAGER:
        _make_eager(twin)
    elif method == UNPACKED:
        for layer in layers.values():
            layer.prepack = False
    else:
        lxk.eject_lora_xs(twin)
        head = subject.head(twin)
        if method == LORA:
            made = _lora(twin, subject.targets, rank)
        else:
            made = _eigentune(twin, subject.targets, rank, layers)
        return _adapted(subject, made, head, 0.0)
    return _adapted(subject, twin, subject.head(twin), 0.0)


def _adapted(subject: Subject, model: nn.Module, head: nn.Module | None, seconds: float) -> Adapted:
    adapter = [p for p in model.parameters() if p.requires_grad]
    of_head = set() if head is None else {id(p) for p in head.parameters()}
    adapter = [p for p in adapter if id(p) not in of_head]
    if head is not None:
        head.requires_grad_(True)
    names = (".A", ".B", ".U", ".Vh")
    bases = [t for name, t in model.named_buffers() if name.endswith(names)]
    return Adapted(subject, model.train(), adapter, bases, seconds)


def _lora(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    made: nn.Module = peft.get_peft_model(model, config)
    return made


def _eigentune(
    model: nn.Module,
    targets: list[str],
    rank: int,
    layers: dict[str, lxk.LoRAXSLinear] | None = None,
) -> nn.Module:
    """``layers``: take their bases and cores instead of computing an SVD."""
    import eigentune
    from eigentune.svd import Bases

    config = eigentune.EigenTuneConfig(
        rank=rank, method="spectral_core", target_modules=targets, backend="auto"
    )
    given: dict[str, Any] = {}
    for name, layer in (layers or {}).items():
        S = layer.A.norm(dim=1)
        given[name] = Bases(layer.B, S, layer.A / S[:, None], tuple(range(rank)), "")
    made: nn.Module = eigentune.get_eigentune_model(model, config, bases=given or None)
    with torch.no_grad():
        for name, layer in (layers or {}).items():
            core: Any = made.get_submodule(name).core
            core.copy_(layer.scaling * layer.R * layer.A.norm(dim=1))
    return made


def _make_eager(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, lxk.LoRAXSLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, EagerLoRAXSLinear(module))


def official_seconds(subject: Subject, model: nn.Module, rank: int) -> float:
    """Seconds that the official code's SVD (scikit-learn) takes for all targets, in turn."""
    from bench.svd_contenders import OFFICIAL, PEERS

    (run,) = (peer.run for peer in PEERS if peer.name == OFFICIAL)
    weights = [
        module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in subject.targets
    ]
    started = time.perf_counter()
    for weight in weights:
        run(weight, rank, 0)
    return time.perf_counter() - started


def checkpointing(subject: Subject, model: nn.Module, on: bool) -> None:
    """Recompute activations in the backward pass, or keep them."""
    inner = subject.inner(model)
    # transformers 5 calls it activation checkpointing, 4 gradient checkpointing.
    kind = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(inner, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(inner, f"{kind}_checkpointing_disable")()


def check_agreement(adapted: dict[str, Adapted], batch: dict[str, Tensor]) -> None:
    """Raise unless the methods of :data:`ALIKE` have the loss and the gradients of ``EAGER``.

    The gradient of EigenTune's core is compared with that of ours times the singular values that
    its bases lack, by the norm over all layers.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    found = {}
    for name in (n for n in adapted if n in ALIKE):
        a = adapted[name]
        loss = a.subject.loss(a.model, batch)
        grads = torch.autograd.grad(loss, a.adapter)
        if name == EIGENTUNE:
            modules: list[Any] = [m for m in a.model.modules() if hasattr(m, "core")]
            grads = tuple(g * m.S for g, m in zip(grads, modules, strict=True))
        found[name] = loss.item(), torch.cat([g.flatten() for g in grads])
    want, truth = found[EAGER]
    for name, (value, grad) in found.items():
        apart = float((grad - truth).norm() / truth.norm())
        if abs(value - want) > 1e-4 * abs(want) or apart > 1e-3:
            raise RuntimeError(
                f"{name}: loss {value:.6f} and a gradient {apart:.1e} away from eager's, whose "
                f"loss is {want:.6f}"
            )
