"""The definition in plain PyTorch, and the one tolerance rule of the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
S = 0.7


@dataclass
class Problem:
    """The operands of one call, and what differentiates it."""

    x: Tensor
    weight: Tensor
    A: Tensor
    R: Tensor
    B: Tensor
    bias: Tensor
    grad_y: Tensor
    ids: Tensor | None = None

    def to(self, dtype: torch.dtype, core: torch.dtype | None = None) -> Problem:
        names = ("x", "weight", "A", "B", "bias", "grad_y")
        cast = {n: getattr(self, n).to(dtype) for n in names}
        return Problem(**cast, R=self.R.to(core or dtype), ids=self.ids)


def problem(
    rows: int, k: int, n: int, rank: int, *, adapters: int | None = None, seed: int = 0
) -> Problem:
    g = torch.Generator().manual_seed(seed * 104729 + rows * 7919 + k * 31 + n * 17 + rank)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    shape = (rank, rank) if adapters is None else (adapters, rank, rank)
    ids = None if adapters is None else torch.randint(-1, adapters, (rows,), generator=g)
    return Problem(
        draw(rows, k), draw(n, k, scale=k**-0.5), draw(rank, k, scale=k**-0.5),
        draw(*shape, scale=rank**-0.5), draw(n, rank, scale=rank**-0.5), draw(n), draw(rows, n),
        ids,
    )  # fmt: skip


def eager(p: Problem, x: Tensor, R: Tensor, bias: Tensor, *, packed: bool = False) -> Tensor:
    """The expression every implementation runs; ``packed``: with oneDNN's product as the base."""
    if packed:
        base = PackedLinear.apply(x, p.weight, bias)
    else:
        base = F.linear(x, p.weight, bias)
    q = (x @ p.A.T).to(R.dtype)
    if p.ids is None:
        t = q @ R.T
    else:
        t = torch.einsum("mj,mij->mi", q, R[p.ids.clamp(min=0)]) * (p.ids >= 0).unsqueeze(1)
    return base + S * (t.to(x.dtype) @ p.B.T)


class PackedLinear(torch.autograd.Function):
    """The bare packed product, forward and backward: the other fp32 product of docs/cpu.md."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.weight = weight
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias.detach(), "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        packed = torch.ops.mkldnn._reorder_linear_weight(ctx.weight.T.contiguous(), None)
        dx = torch.ops.mkldnn._linear_pointwise(grad.contiguous(), packed, None, "none", [], "")
        return dx, None, grad.sum(0)


def results(f: Any, p: Problem) -> dict[str, Tensor]:
    """y and all gradients of ``f(x, R, bias)``."""
    leaves = [t.detach().clone().requires_grad_() for t in (p.x, p.R, p.bias)]
    y = f(*leaves)
    grads = torch.autograd.grad(y, leaves, p.grad_y)
    return dict(zip(("y", "dx", "dR", "db"), (y.detach(), *grads), strict=True))


Case = tuple[dict[str, Tensor], Problem, Problem]


def check(*cases: Case) -> None:
    """The tolerance rule: twice the eager error plus 2 eps of the largest value; max and RMS.

    A case is (what was computed, the problem in float64, the problem in the dtype). Errors of
    several cases are pooled: a single number, such as dR at rank 1, has a lucky eager error too
    often.
    In float64 there is no better truth; the classical bound for sums of n terms, n * eps, counts.
    """
    pooled: dict[str, list[list[Tensor]]] = {}
    for got, p64, p in cases:
        truth = results(lambda x, R, b, q=p64: eager(q, x, R, b), p64)
        peers = [results(lambda x, R, b, q=p: eager(q, x, R, b), p)]
        if p.x.dtype == torch.float32 and len(p.x):
            peers.append(results(lambda x, R, b, q=p: eager(q, x, R, b, packed=True), p))
        for name, value in got.items():
            assert value.dtype == peers[0][name].dtype
            assert value.shape == truth[name].shape
            columns = [truth[name], value, *(peer[name] for peer in peers)]
            pooled.setdefault(name, []).append([c.double().flatten() for c in columns])
    dtype, terms = cases[0][2].x.dtype, sum(cases[0][2].weight.shape)
    for name, rows in pooled.items():
        true, value, *others = (torch.cat(column) for column in zip(*rows, strict=True))
        if not true.numel():
            continue
        eps = torch.finfo(cases[0][0][name].dtype).eps
        rule(name, true, value, others, (terms if dtype == torch.float64 else 2) * eps)


def rule(name: str, true: Tensor, value: Tensor, others: list[Tensor], slack: float) -> None:
    """The rule itself, for float64 tensors; ``slack`` is relative to the largest true value."""
    slack = slack * float(true.abs().max())
    errors = [(other - true).abs() for other in others]
    error = (value - true).abs()
    assert error.max() <= 2 * max(e.max() for e in errors) + slack, name
    rms = max(e.square().mean().sqrt() for e in errors)
    assert error.square().mean().sqrt() <= 2 * rms + slack, name


def frozen(p: Problem) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    made = [nn.Parameter(t, requires_grad=False) for t in (p.weight, p.A, p.B)]
    return made[0], made[1], made[2]
