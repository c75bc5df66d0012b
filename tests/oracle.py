"""What counts as right: problems with known answers and the one tolerance rule of all tests.

A result is right if its error against the float64 truth is at most twice the error that the same
expression, written in plain PyTorch and run in the same dtype, makes on the same numbers, plus two
units in the last place of the largest value; for the largest error and for the RMS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loraxs_kernels as lxk

SCALING = 0.7
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: (dtype of x, dtype of R)
DTYPE_PAIRS = (
    *((d, d) for d in DTYPES),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)
RANKS = (1, 4, 12, 20, 25, 64, 136, 256)

Results = dict[str, Tensor]
Leaves = dict[str, Tensor]
_CAST = ("x", "weight", "A", "B", "bias", "grad_y", "base")


@dataclass(frozen=True)
class Problem:
    """The operands of one call and the gradient that arrives at its output.

    ``base`` makes it an update of a given output; then ``weight`` and ``bias`` play no part.
    """

    x: Tensor
    weight: Tensor
    A: Tensor
    R: Tensor
    B: Tensor
    bias: Tensor
    grad_y: Tensor
    base: Tensor | None = None
    ids: Tensor | None = None
    keep: Tensor | None = None
    dropout_p: float = 0.0

    def to(self, dtype: torch.dtype, core: torch.dtype | None = None) -> Problem:
        values = {n: getattr(self, n) for n in _CAST}
        cast = {n: t if t is None else t.to(dtype) for n, t in values.items()}
        return dataclasses.replace(self, **cast, R=self.R.to(core or dtype))

    def change(self, **values: Any) -> Problem:
        return dataclasses.replace(self, **values)

    def leaves(self) -> Leaves:
        """What is differentiated, as new leaves."""
        names = ("x", "R", "bias") if self.base is None else ("x", "R", "base")
        return {n: getattr(self, n).detach().requires_grad_() for n in names}


def make_problem(
    rows: int,
    k: int,
    n: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float64,
    core: torch.dtype | None = None,
    adapters: int | None = None,
    update: bool = False,
    seed: int = 0,
) -> Problem:
    """Random operands of which none is zero, with ids in -1 .. adapters - 1.

    The frozen matrices are parameters, as in a layer, so that they are packed at once.
    """
    g = torch.Generator().manual_seed(seed * 104729 + rows * 7919 + k * 31 + n * 17 + rank)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    def freeze(t: Tensor) -> Tensor:
        return nn.Parameter(t.to(dtype), requires_grad=False)

    cores = (rank, rank) if adapters is None else (adapters, rank, rank)
    return Problem(
        x=draw(rows, k).to(dtype),
        weight=freeze(draw(n, k, scale=k**-0.5)),
        A=freeze(draw(rank, k, scale=k**-0.5)),
        R=draw(*cores, scale=rank**-0.5).to(core or dtype),
        B=freeze(draw(n, rank, scale=rank**-0.5)),
        bias=draw(n).to(dtype),
        grad_y=draw(rows, n).to(dtype),
        base=draw(rows, n).to(dtype) if update else None,
        ids=None if adapters is None else torch.randint(-1, adapters, (rows,), generator=g),
    )


def side_path(p: Problem, x: Tensor, R: Tensor) -> Tensor:
    """``B (R (A x))`` in plain PyTorch, as users write it."""
    if p.keep is not None:
        x = torch.where(p.keep, x * (1.0 / (1.0 - p.dropout_p)), 0.0).to(x.dtype)
    q = (x @ p.A.T).to(R.dtype)
    if p.ids is None:
        t = q @ R.T
    else:
        own = R[p.ids.clamp(min=0)]
        t = torch.einsum("mj,mij->mi", q, own) * (p.ids >= 0).unsqueeze(1)
    return t.to(x.dtype) @ p.B.T


def eager(p: Problem, leaves: Leaves) -> Tensor:
    """The same-dtype PyTorch expression that the rule measures by."""
    base = leaves.get("base")
    if base is None:
        base = F.linear(leaves["x"], p.weight, leaves["bias"])
    return base + SCALING * side_path(p, leaves["x"], leaves["R"])


class _PackedLinear(torch.autograd.Function):
    """PyTorch's other product in float32: oneDNN's with a packed weight; it sums in its own order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.weight = weight
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        return torch.ops.mkldnn._linear_pointwise(
            x.contiguous(), packed, bias.detach(), "none", [], ""
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        packed = torch.ops.mkldnn._reorder_linear_weight(ctx.weight.T.contiguous(), None)
        dx = torch.ops.mkldnn._linear_pointwise(grad.contiguous(), packed, None, "none", [], "")
        return dx, None, grad.sum(0)


def packed_eager(p: Problem, leaves: Leaves) -> Tensor:
    """:func:`eager` with oneDNN's packed product."""
    base = _PackedLinear.apply(leaves["x"], p.weight, leaves["bias"])
    return base + SCALING * side_path(p, leaves["x"], leaves["R"])


def ours(p: Problem, leaves: Leaves, **options: Any) -> Tensor:
    """The public function that solves ``p``; ``p.ids`` count unless ``adapter_ids`` is given."""
    options = {"scaling": SCALING, "adapter_ids": p.ids, **options}
    x, R, base = leaves["x"], leaves["R"], leaves.get("base")
    if base is not None:
        return lxk.lora_xs_update(base, x, p.A, R, p.B, **options)
    return lxk.lora_xs_linear(x, p.weight, p.A, R, p.B, leaves["bias"], **options)


def evaluate(f: Callable[[Problem, Leaves], Tensor], p: Problem) -> Results:
    """``y`` and the gradients ``dx``, ``dR`` and ``dbias`` (or ``dbase``) of ``f``."""
    leaves = p.leaves()
    y = f(p, leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), p.grad_y)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def check(p: Problem | Sequence[Problem], **options: Any) -> None:
    """Run the public function with ``options`` and judge y and every gradient by the rule."""
    problems = [p] if isinstance(p, Problem) else list(p)
    assert_right([(q, evaluate(lambda q, l: ours(q, l, **options), q)) for q in problems])


def assert_right(cases: Sequence[tuple[Problem, Results]]) -> None:
    """The tolerance rule for what was computed for each problem.

    The errors of several problems are pooled: of a single number (dR at rank 1) the error of the
    plain expression is too often small by luck. In float64, where there is no better truth, the
    classical bound for sums of n terms, n * eps, takes the place of 2 * eps.
    """
    columns: dict[str, list[list[Tensor]]] = {}
    for p, got in cases:
        truth = evaluate(eager, p.to(torch.float64))
        peers = [evaluate(eager, p)]
        packs = torch.backends.mkldnn.is_available() and p.base is None and len(p.x) > 0
        if p.x.dtype == torch.float32 and packs:
            peers.append(evaluate(packed_eager, p))
        assert got.keys() == truth.keys()
        for name, value in got.items():
            assert value.dtype == peers[0][name].dtype, name
            assert value.shape == truth[name].shape, name
            row = [truth[name], value, *(peer[name] for peer in peers)]
            columns.setdefault(name, []).append([t.double().flatten() for t in row])
    for name, parts in columns.items():
        true, value, *others = (torch.cat(column) for column in zip(*parts, strict=True))
        if true.numel():
            _assert_close(name, cases[0], true, value, others)


def _assert_close(
    name: str, case: tuple[Problem, Results], true: Tensor, value: Tensor, others: list[Tensor]
) -> None:
    p, got = case
    units = sum(p.weight.shape) + len(p.x) if p.x.dtype == torch.float64 else 2
    slack = float(units * torch.finfo(got[name].dtype).eps * true.abs().max())
    error, allowed = (value - true).abs(), [(other - true).abs() for other in others]
    largest = 2 * max(float(e.max()) for e in allowed) + slack
    rms = 2 * max(float(e.square().mean().sqrt()) for e in allowed) + slack
    assert not error.isnan().any(), f"{name} has NaN"
    assert float(error.max()) <= largest, f"{name}: error {float(error.max())}, allowed {largest}"
    found = float(error.square().mean().sqrt())
    assert found <= rms, f"{name}: RMS error {found}, allowed {rms}"


def philox(key: int, counter: int) -> int:
    """First word of Philox4x32-10 with counter ``(counter, 0)``, in plain integers (SC'11)."""
    word = 0xFFFFFFFF
    c, k = [counter & word, counter >> 32, 0, 0], [key & word, key >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & word, (a >> 32) ^ c[3] ^ k[1], a & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return c[0]
