"""What ``bench_multi`` times: a layer with an adapter per row, and one pass of each contender.

The contenders with LoRA-XS compute the same from the same numbers. Ordinary LoRA computes another
function, with as much arithmetic per row: it stands for what an adapter per row costs when nothing
is shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gpu_cases, popularity
from bench.linear_cases import (
    TOLERANCE,
    Call,
    Case,
    Operands,
    Step,
    Weights,
    check_equal,
    step,
)
from bench.linear_cases import bare as bare_on_cpu
from loraxs_kernels import AdapterBatch, lora_xs_linear

SCALING = 1.0

ADAPTERS = (1, 8, 64, 1024)
ROWS = (1, 16, 128, 1024, 4096)
PASSES = ("fwd", "fwdbwd")

#: Ordinary LoRA is left out where its factors, or those gathered for all rows, need more bytes.
LORA_LIMIT = 1 << 31

#: Factors gathered at once by ordinary LoRA, in bytes: enough to be fast, little enough to fit.
_GATHER_CHUNK = 1 << 28


@dataclass(frozen=True)
class MultiCase:
    """One line of the table: a layer, and who asks for which of how many adapters."""

    layer: Case
    adapters: int
    popularity: str
    order: str

    @property
    def ids(self) -> Tensor:
        """int64 ``[M]``, on the CPU."""
        return popularity.draw(self.popularity, self.order, self.layer.rows, self.adapters)

    def __str__(self) -> str:
        return f"{self.layer}, {self.adapters} adapters, {self.popularity}, {self.order}"


def distinct_adapters(ids: Tensor) -> int:
    """How many adapters occur among the rows."""
    return int(torch.unique(ids[ids >= 0]).numel())


# ------------------------------------------------------------------------------ which cases


def select(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    rows: Sequence[int],
    adapters: Sequence[int],
    kinds: Sequence[str],
    orders: Sequence[str],
    dtypes: Sequence[str],
    passes: Sequence[str],
) -> list[MultiCase]:
    """All combinations; of those that come to the same ids, the first."""
    cases: list[MultiCase] = []
    seen: set[tuple[Case, int, tuple[int, ...]]] = set()
    for shape in shapes:
        for dtype in dtypes:
            for rank in ranks:
                for m in rows:
                    layers = [Case(*shape, m, rank, dtype, what) for what in passes]
                    grid = ((n, k, o) for n in adapters for k in kinds for o in orders)
                    for n, kind, order in grid:
                        found = [MultiCase(layer, n, kind, order) for layer in layers]
                        ids = tuple(found[0].ids.tolist())
                        cases += [c for c in found if (c.layer, n, ids) not in seen]
                        seen.update((layer, n, ids) for layer in layers)
    return [case for case in cases if case.layer.rank <= min(case.layer.shape)]


def default_cases(device: str) -> list[MultiCase]:
    """The list of a run, thinned so that it takes minutes.

    Thinned means: all rows with 64 adapters and uniform ids; everything else at 16 and 1024 rows.
    """
    shape, rank, dtype = (
        ((1024, 1024), 16, "fp32") if device == "cpu" else ((4096, 4096), 64, "bf16")
    )
    full = select(
        [shape], [rank], (16, 1024), ADAPTERS, popularity.KINDS, popularity.ORDERS, [dtype], PASSES
    )
    wide = select([shape], [rank], ROWS, [64], ["uniform"], ["shuffled"], [dtype], PASSES)
    return list(dict.fromkeys([*wide, *full]))


def quick_cases(device: str) -> list[MultiCase]:
    """A few cases, for a look within a minute."""
    shape, rank, dtype = (
        ((1024, 1024), 16, "fp32") if device == "cpu" else ((4096, 4096), 64, "bf16")
    )
    points = [
        (16, 8, "uniform", "shuffled"), (16, 1024, "distinct", "shuffled"),
        (512, 8, "uniform", "sorted"), (512, 64, "zipf", "shuffled"), (512, 64, "base", "shuffled"),
        (512, 1024, "distinct", "shuffled"),
    ]  # fmt: skip
    return [
        MultiCase(Case(*shape, m, rank, dtype, what), n, kind, order)
        for m, n, kind, order in points
        for what in PASSES
    ]


# ------------------------------------------------------------------------------- contenders


class MultiOperands(Operands):
    """The inputs of one case, the same for every contender.

    Attributes:
        ids: int64 ``[M]``.
        batch: the ids, validated and sorted once, as a model does for all its layers.
        cores: ``[n, r, r]``, float32.
        segments: ``(adapter, its rows)`` for those that occur, also made once.
        rows, safe: whether a row has an adapter ``[M, 1]``, and an id that can be looked up.
    """

    def __init__(self, case: MultiCase, weights: Weights, device: str) -> None:
        super().__init__(case.layer, weights.linear, device)
        n, r = case.adapters, case.layer.rank
        self.cores = self.normal(n, r, r) / r**0.5
        ids = case.ids
        self.ids = ids.to(device)
        self.batch = AdapterBatch(self.ids, n)
        present = torch.unique(ids[ids >= 0])
        self.segments = [
            (int(a), (ids == a).nonzero().flatten().to(device)) for a in present.tolist()
        ]
        self.present = present.to(device)
        self.safe = self.ids.clamp(min=0)
        self.rows = (self.ids >= 0).unsqueeze(1)

    def base(self, x: Tensor) -> Tensor:
        """The frozen layer."""
        return F.linear(x, self.linear.weight, self.linear.bias)


@dataclass(frozen=True)
class Contender:
    """One pass, and how its result reads for comparison.

    Attributes:
        step: the pass.
        group: contenders of one group compute the same.
        results: the tensors of a pass: y, or dx and the gradients of the adapters that occur.
    """

    step: Step
    group: str
    results: Callable[[Any], list[Tensor]]


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _stacked(layer: Case, factors: int = 1) -> Callable[[Any], list[Tensor]]:
    """Gradients that come one by one, each factor's together."""

    def read(result: Any) -> list[Tensor]:
        if not layer.trains:
            return _tensors(result)
        dx, *grads = result
        count = len(grads) // factors
        parts = [grads[i * count : (i + 1) * count] for i in range(factors)]
        return [dx, *(torch.stack(part) for part in parts if part)]

    return read


def _present(ops: MultiOperands, layer: Case) -> Callable[[Any], list[Tensor]]:
    """Of gradients for all adapters, those that occur."""

    def read(result: Any) -> list[Tensor]:
        if not layer.trains:
            return _tensors(result)
        dx, *grads = result
        return [dx, *(grad.index_select(0, ops.present) for grad in grads if ops.segments)]

    return read


def _ours(
    case: MultiCase, ops: MultiOperands, ids: Tensor | AdapterBatch, backend: str | None = None
) -> Contender:
    cores = ops.cores.detach().clone().requires_grad_(case.layer.trains)
    weight, bias = ops.linear.weight, ops.linear.bias

    def layer(x: Tensor) -> Tensor:
        return lora_xs_linear(
            x, weight, ops.A, cores, ops.B, bias, scaling=SCALING, adapter_ids=ids, backend=backend
        )

    return Contender(step(case.layer, layer, [cores]), "LoRA-XS", _present(ops, case.layer))


def _single(case: MultiCase, ops: MultiOperands) -> Contender:
    """One adapter for all rows and no ids: what the choice per row adds to."""
    core = ops.cores[0].detach().clone().requires_grad_(case.layer.trains)
    weight, bias = ops.linear.weight, ops.linear.bias

    def layer(x: Tensor) -> Tensor:
        return lora_xs_linear(x, weight, ops.A, core, ops.B, bias, scaling=SCALING)

    return Contender(step(case.layer, layer, [core]), "single", _tensors)


def _loop(case: MultiCase, ops: MultiOperands) -> Contender:
    """Eager LoRA-XS on each adapter's rows in turn, as PEFT mixes adapters in a batch."""
    trains = case.layer.trains
    cores = [ops.cores[a].to(ops.dtype).requires_grad_(trains) for a, _ in ops.segments]

    def layer(x: Tensor) -> Tensor:
        y = ops.base(x)
        for core, (_, rows) in zip(cores, ops.segments, strict=True):
            part = x.index_select(0, rows)
            y.index_add_(0, rows, part @ ops.A.t() @ core.t() @ ops.B.t(), alpha=SCALING)
        return y

    return Contender(step(case.layer, layer, cores), "LoRA-XS", _stacked(case.layer))


def _bmm(case: MultiCase, ops: MultiOperands) -> Contender:
    """Eager LoRA-XS with each row's core gathered, and a batched product of rows."""
    cores = ops.cores.to(ops.dtype, copy=True).requires_grad_(case.layer.trains)

    def layer(x: Tensor) -> Tensor:
        q = (x @ ops.A.t()).unsqueeze(1)
        t = torch.bmm(q, cores.index_select(0, ops.safe).mT).squeeze(1)
        return ops.base(x) + torch.where(ops.rows, t, 0) @ ops.B.t() * SCALING

    return Contender(step(case.layer, layer, [cores]), "LoRA-XS", _present(ops, case.layer))


class _Factors:
    """Ordinary LoRA's pair of factors per adapter: ``down [n, r, in]``, ``up [n, out, r]``."""

    def __init__(self, case: MultiCase, ops: MultiOperands) -> None:
        layer, n = case.layer, case.adapters
        self.row_bytes = layer.rank * sum(layer.shape) * ops.x.element_size()
        gathered = layer.rows if layer.trains else 1
        worst = max(n, gathered) * self.row_bytes
        if worst > LORA_LIMIT:
            raise ValueError(
                f"its factors, or those gathered per row, exceed {LORA_LIMIT >> 30} GiB"
            )
        self.down = (ops.normal(n, layer.rank, layer.in_features) / layer.in_features**0.5).to(
            ops.dtype
        )
        self.up = (ops.normal(n, layer.out_features, layer.rank) / layer.rank**0.5).to(ops.dtype)


def _lora_gather(case: MultiCase, ops: MultiOperands, factors: _Factors) -> Contender:
    """Ordinary LoRA as Punica's BGMV has it: each row gathers its adapter's two factors."""
    trains = case.layer.trains
    down = factors.down.detach().requires_grad_(trains)
    up = factors.up.detach().requires_grad_(trains)
    chunk = max(1, _GATHER_CHUNK // factors.row_bytes)

    def layer(x: Tensor) -> Tensor:
        sides = []
        for rows, ids in zip(x.split(chunk), ops.safe.split(chunk), strict=True):
            q = torch.bmm(rows.unsqueeze(1), down.index_select(0, ids).mT)
            sides.append(torch.bmm(q, up.index_select(0, ids).mT).squeeze(1))
        return ops.base(x) + torch.where(ops.rows, torch.cat(sides), 0) * SCALING

    return Contender(step(case.layer, layer, [down, up]), "LoRA", _present(ops, case.layer))


def _lora_segments(case: MultiCase, ops: MultiOperands, factors: _Factors) -> Contender:
    """Ordinary LoRA as Punica's SGMV has it: the rows of one adapter together."""
    trains = case.layer.trains
    downs = [factors.down[a].detach().requires_grad_(trains) for a, _ in ops.segments]
    ups = [factors.up[a].detach().requires_grad_(trains) for a, _ in ops.segments]

    def layer(x: Tensor) -> Tensor:
        y = ops.base(x)
        for down, up, (_, rows) in zip(downs, ups, ops.segments, strict=True):
            part = x.index_select(0, rows)
            y.index_add_(0, rows, part @ down.t() @ up.t(), alpha=SCALING)
        return y

    return Contender(step(case.layer, layer, [*downs, *ups]), "LoRA", _stacked(case.layer, 2))


def _bare(case: MultiCase, ops: MultiOperands, weights: Weights) -> dict[str, Contender]:
    if ops.device != "cpu":
        steps = gpu_cases.bare(case.layer, ops)
    else:
        calls = bare_on_cpu(case.layer, ops, weights)
        steps = {name: functools.partial(_ignoring_inputs, c) for name, c in calls.items()}
    return {name: Contender(one, "bare", _tensors) for name, one in steps.items()}


def _ignoring_inputs(call: Call, x: Tensor, grad_y: Tensor) -> Any:
    return call()


def contenders(
    case: MultiCase, ops: MultiOperands, weights: Weights
) -> tuple[dict[str, Contender], dict[str, str]]:
    """``(contenders, skipped)`` by name; ``skipped`` says why one is missing.

    ``ours`` gets an :class:`AdapterBatch` that was made before, ``ours raw ids`` a tensor that each
    pass has to check and sort (on the CPU).
    """
    found = {
        "ours": _ours(case, ops, ops.batch),
        "ours raw ids": _ours(case, ops, ops.ids),
        "single": _single(case, ops),
        "loop": _loop(case, ops),
        "bmm": _bmm(case, ops),
        **_bare(case, ops, weights),
    }
    try:
        factors = _Factors(case, ops)
    except ValueError as error:
        return found, dict.fromkeys(("lora gather", "lora segments"), str(error))
    found["lora gather"] = _lora_gather(case, ops, factors)
    found["lora segments"] = _lora_segments(case, ops, factors)
    return found, {}


def check_agreement(case: MultiCase, found: dict[str, Contender], calls: dict[str, Call]) -> None:
    """See that the contenders of a group compute the same.

    Args:
        case: for the message and the tolerance.
        found: the contenders.
        calls: one pass of each of those that are timed.

    Raises:
        RuntimeError: one differs.
    """
    for group, first in (("LoRA-XS", "bmm"), ("LoRA", "lora gather")):
        names: Iterable[str] = [n for n in calls if found[n].group == group]
        if first not in calls:
            continue
        # A graph's tensors are filled anew by each replay, by this contender's only.
        expected = found[first].results(calls[first]())
        for name in names:
            if name != first:
                got = found[name].results(calls[name]())
                tolerance = TOLERANCE[case.layer.dtype]
                check_equal(f"{case}: {name}", got, expected, tolerance)
