"""The training kernels of csrc/cuda/sm80 on a GPU that is not there.

One layer, both passes, executed from PTX by ``tests/ptx``; and what a launch should cost: the
formulas of csrc/cuda/sm80/kernels.cuh, device/core.cuh and device/gradient.cuh, added up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests import oracle
from tests.cuda_layer import BF16, ELEMENTS, FP32, Layer, Pass, up
from tests.cuda_problem import Facts, ceil_div
from tests.cuda_ptx import operands

SCHEMES = ("ride_along", "ticket", "unaligned")


def facts(scheme: str, dtype: torch.dtype, direction: str) -> Facts:
    """What ``sm80::describe`` says of a kernel."""
    rides = scheme == "ride_along"
    return Facts(
        f"loraxs_sm80_{scheme}_{ELEMENTS[dtype]}_{direction}", "ride-along" if rides else "ticket",
        direction, bm=128, bn=128, bk=32, br=16 if rides else 64, cr=32, di=64, dj=64, dm=64,
        db_columns=64, threads=256, shared=69632, element=str(dtype).removeprefix("torch."),
    )  # fmt: skip


@dataclass
class Case(Layer):
    """One layer, both passes; ``scheme`` is one of ``SCHEMES``."""

    scheme: str
    rows: int
    k: int
    n: int
    rank: int
    dtype: torch.dtype = BF16
    core: torch.dtype = FP32
    chunks: int = 2
    adapters: int | None = None
    ids: Tensor | None = None
    sort: bool = False
    scaling: float = oracle.S
    seed: int = 0
    views: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        size = f"{self.rows}x{self.k}x{self.n}-{self.rank}"
        return f"{self.scheme}-{size}-{ELEMENTS[self.dtype]}-{self.core}".replace("torch.", "")

    def launch(self, direction: str, given: dict[str, Any]) -> Pass:
        f = facts(self.scheme, self.dtype, direction)
        own: dict[str, Any] = {"group": 2}
        if direction == "forward":
            own["side_cols"] = self.rank
        else:
            own["chunks"] = self.chunks
        return self.executed(f, operands(f, **(own | given)))


# ---------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Flops:
    """Of one launch. ``needed``: in whole tiles, if nothing is computed twice; ``again``: what
    riding along computes again in every tile but the first of a row block.
    """

    needed: int
    again: int


def _adapters(p: Pass, rows: int) -> int:
    """The distinct adapters of each group of ``rows`` rows, added up."""
    if "ids" not in p:
        return ceil_div(p.operands.fields["m"], rows)
    n = p.operands.fields["adapters"]
    return sum(len({i for i in group.tolist() if 0 <= i < n}) for group in p["ids"].split(rows))


def segments(p: Pass) -> list[int]:
    """The rows of each chunk of each adapter's dR that are looked at."""
    f = p.operands.fields
    if "order" in p:
        rows = p["offsets"].diff()[1:].tolist()
    else:
        rows = [f["m"]] * f["adapters"]
    found = []
    for n in rows:
        step = up(ceil_div(n, f["chunks"]), 64)
        found += [max(0, min(step, n - c * step)) for c in range(f["chunks"])]
    return found


def flops(p: Pass) -> Flops:
    """The formulas of kernels.cuh, core.cuh and gradient.cuh. Scanned ids: up to 1024 rows."""
    f = p.operands.fields
    m, n, k, r8 = up(f["m"], 128), up(f["n"], 128), up(f["k"], 32), up(f["rank"], 8)
    rides, has_d = p.facts.family == "ride-along", "d" in p
    products = 2 if f["core_is_fp32"] else 1
    main = 2 * m * n * k if has_d and "w" in p else 0
    shrink = 2 * m * k * r8
    if rides:
        core = products * 2 * m * r8**2
    else:
        core = products * 2 * 16 * _adapters(p, 16) * r8**2
    expand = 2 * m * n * (16 if rides else f["t_cols"])
    dR = 0
    if "dr" in p:
        rows = segments(p)
        if "ids" in p and "order" not in p:  # chunks without a hit are passed over
            rows = [s for s, hit in zip(rows, _hits(p), strict=True) if hit]
        dR = sum(2 * up(s, 64) * up(f["rank"], 16) * r8 for s in rows)
    again = (f["col_tiles"] - 1) * (shrink + core) if rides else 0
    return Flops(main + shrink + (core + expand if has_d else 0) + dR, again)


def _hits(p: Pass) -> list[bool]:
    f = p.operands.fields
    step = up(ceil_div(f["m"], f["chunks"]), 64)
    spans = [p["ids"][c * step : (c + 1) * step] for c in range(f["chunks"])]
    return [bool((s == a).any()) for a in range(f["adapters"]) for s in spans]


def least(p: Pass) -> int:
    """Bytes, every operand once per tile (and Q's slices are tiles of 64 columns)."""
    f, e = p.operands.fields, 2
    m, k, r, t = (f[name] for name in ("m", "k", "rank", "t_cols"))
    blocks, tiles, slices = f["row_blocks"], f["col_tiles"], f["slices"]
    rides, has_w = p.facts.family == "ride-along", "w" in p
    size = {name: t.numel() * t.element_size() for name, t in p.operands.tensors.items()}
    total = (slices + (tiles if has_w or rides else 0)) * m * k * e
    if tiles:
        total += blocks * (size.get("w", 0) + size["b"] + 8 * size.get("bias", 0))
        total += size["d"] + size.get("base", 0)
    core = r * r * p["core"].element_size()
    if rides:
        total += blocks * tiles * (size["a"] + core) + size.get("side", 0)
    else:
        total += blocks * size["a"] + m * r * e
        if tiles:
            total += _adapters(p, 64) * core + m * r * e + (1 + tiles) * m * t * e
            total += size.get("ids", 0)
    return total + _least_of_gradients(p)


def _least_of_gradients(p: Pass) -> int:
    f, total = p.operands.fields, 0
    if "dr" in p:
        side = ceil_div(f["rank"], 64)
        rows = sum(segments(p)) if "order" in p or "ids" not in p else f["m"]
        total += 2 * side * rows * f["rank"] * 2 + p["dr"].numel() * p["dr"].element_size()
        if "order" in p:
            total += rows * side**2 * 8
        elif "ids" in p:  # scanned, then read again
            total += 2 * f["adapters"] * f["m"] * side**2 * 8
        if f["chunks"] > 1:
            total += 2 * 4 * 64 * 64 * f["dr_items"]
    if "db" in p:
        total += (p["x"].numel() + f["k"]) * 2
    return total
