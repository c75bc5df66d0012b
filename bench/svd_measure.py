"""Time and accuracy of truncated SVDs, on one matrix and over all layers of a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.svd_contenders import Contender
from bench.svd_metrics import Accuracy, Triplets, Truth, accuracy
from loraxs_kernels.initialization import Job, initial_factors
from loraxs_kernels.initialization.pool import run_at_once

#: Runs of a seeded contender that are judged.
SEEDS = 3
#: Threads of OpenBLAS spin for about so long after a NumPy contender.
PAUSE_S = 0.05
#: Over a whole model, what takes longer than this is timed once.
SLOW_MODEL_S = 4.0


@dataclass(frozen=True)
class Measured:
    """One contender on one job.

    Attributes:
        seconds: median; on a model, of all layers together.
        runs: how many timings that is the median of.
        accuracies: of several seeds on a matrix; of every layer of a model.
    """

    name: str
    ours: bool
    seconds: float
    runs: int
    accuracies: tuple[Accuracy, ...]

    def median(self, field: str = "pve") -> float:
        """The median of a field of :class:`~bench.svd_metrics.Accuracy`."""
        return statistics.median(getattr(a, field) for a in self.accuracies)

    def worst(self, field: str = "pve") -> float:
        """Its largest value."""
        return max(getattr(a, field) for a in self.accuracies)


@dataclass(frozen=True)
class Result:
    """All contenders on one job: a square matrix (``layers`` 1, ``size`` n) or a model (size 0).

    ``others``: what :class:`bench.common.Others` said about the time in which it was measured.
    """

    job: str
    rank: int
    measured: dict[str, Measured]
    size: int = 0
    spectrum: str = ""
    layers: int = 1
    others: str = ""

    @property
    def is_model(self) -> bool:
        """Whether the job is all layers of a model."""
        return self.size == 0

    @property
    def ours(self) -> list[Measured]:
        """Our settings, the fastest first."""
        return sorted((m for m in self.measured.values() if m.ours), key=lambda m: m.seconds)

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)


class _Recorded:
    """A call that goes through the seeds, and keeps the result of each."""

    def __init__(self, contender: Contender, matrix: Tensor, rank: int) -> None:
        self._contender, self._matrix, self._rank = contender, matrix, rank
        self._seeds = SEEDS if contender.seeded else 1
        self._calls = 0
        self.found: dict[int, Triplets] = {}

    def __call__(self) -> None:
        seed = self._calls % self._seeds
        self._calls += 1
        self.found[seed] = self._contender.run(self._matrix, self._rank, seed)


def measure_matrix(
    matrix: Tensor,
    truth: Truth,
    rank: int,
    contenders: Sequence[Contender],
    *,
    budget_s: float,
    min_rounds: int = 3,
) -> dict[str, Measured]:
    """Time the contenders in turns on one matrix, and judge what they found while timed."""
    calls = {c.name: _Recorded(c, matrix, rank) for c in contenders}
    timings = common.interleaved(
        calls, budget_s=budget_s, min_rounds=min_rounds, max_rounds=15, pause_s=PAUSE_S
    )
    return {
        c.name: Measured(
            c.name,
            c.ours,
            timings[c.name].median,
            timings[c.name].samples,
            tuple(accuracy(matrix, truth, found) for found in calls[c.name].found.values()),
        )
        for c in contenders
    }


# ---------------------------------------------------------------------------------- whole models

#: A way to decompose all matrices at once: matrices, rank -> triplets of each.
WholeRun = Callable[[Sequence[Tensor], int], list[Triplets]]


def measure_model(
    matrices: Sequence[Tensor],
    truths: Sequence[Truth],
    rank: int,
    contenders: Sequence[Contender],
    whole: dict[str, WholeRun],
    *,
    passes: int = 3,
) -> dict[str, Measured]:
    """Time the contenders over all layers, in turns on every layer; and judge every layer.

    Args:
        whole: ways of ours that take all layers in one call (several at once, say).
        passes: how often; those that need more than ``SLOW_MODEL_S`` for all layers go once.
    """
    judged: dict[str, tuple[Accuracy, ...]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in [*(c.name for c in contenders), *whole]}
    for contender in contenders:
        contender.run(matrices[0], rank, 0)  # warm-up
    for turn in range(passes):
        racing = [c for c in contenders if turn == 0 or seconds[c.name][0] < SLOW_MODEL_S]
        totals, found = _one_pass(matrices, truths if turn == 0 else None, rank, racing)
        for name, total in totals.items():
            seconds[name].append(total)
        judged |= found
        for name, run in whole.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            results = run(matrices, rank)
            seconds[name].append(time.perf_counter() - start)
            if turn == 0:
                judged[name] = tuple(map(accuracy, matrices, truths, results))
    ours = {c.name for c in contenders if c.ours} | set(whole)
    return {
        name: Measured(name, name in ours, statistics.median(times), len(times), judged[name])
        for name, times in seconds.items()
    }


def _one_pass(
    matrices: Sequence[Tensor],
    truths: Sequence[Truth] | None,
    rank: int,
    contenders: Sequence[Contender],
) -> tuple[dict[str, float], dict[str, tuple[Accuracy, ...]]]:
    """Seconds of each contender over all matrices; its accuracies if there are truths."""
    totals = dict.fromkeys((c.name for c in contenders), 0.0)
    judged: dict[str, list[Accuracy]] = {c.name: [] for c in contenders} if truths else {}
    groups = [[c for c in contenders if c.numpy is side] for side in (False, True)]
    for index, matrix in enumerate(matrices):
        found: dict[str, Triplets] = {}
        for group in groups:
            if groups[1] and group:
                time.sleep(PAUSE_S)  # the other library's threads come to rest
            start = index % max(1, len(group))
            for contender in group[start:] + group[:start]:
                began = time.perf_counter()
                found[contender.name] = contender.run(matrix, rank, index)
                totals[contender.name] += time.perf_counter() - began
        if truths:
            for name, triplets in found.items():
                judged[name].append(accuracy(matrix, truths[index], triplets))
    return totals, {name: tuple(values) for name, values in judged.items()}


def several_at_once(contenders: Sequence[Contender]) -> dict[str, WholeRun]:
    """The same contenders with several layers at once, as the package initializes a model; and
    that initialization itself, from weights to A, R and B."""
    if torch.get_num_threads() == 1:
        return {}
    runs = {f"{c.name}, layers at once": _at_once(c) for c in contenders}
    return {"ours, all factors of the model": _all_factors, **runs}


def _at_once(contender: Contender) -> WholeRun:
    def run(matrices: Sequence[Tensor], rank: int) -> list[Triplets]:
        found: dict[int, Triplets] = {}
        indices, sizes = range(len(matrices)), [w.numel() for w in matrices]
        for index, triplets in run_at_once(
            lambda index: contender.run(matrices[index], rank, index), indices, sizes
        ):
            found[index] = triplets
        return [found[index] for index in indices]

    return run


def _all_factors(matrices: Sequence[Tensor], rank: int) -> list[Triplets]:
    """What inject_lora_xs does; Σ in neither basis, so that A and B are Vh and U."""
    jobs = [Job(str(index), w, rank) for index, w in enumerate(matrices)]
    factors = initial_factors(jobs, {"sigma": "none"})
    found = (factors[job.name] for job in jobs)
    return [Triplets(f.B, f.S, f.A) for f in found]
