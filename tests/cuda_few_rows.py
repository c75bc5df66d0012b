"""The few-row kernels on a GPU that is not there: what a pass computes, and what it should cost.

The kernels of the built library are executed by ``tests/ptx``. ``least`` and ``again`` are the cost
formulas of csrc/cuda/few_rows/few_rows.cuh, added up for one launch.
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


def facts(rows: int, dtype: torch.dtype, direction: str) -> Facts:
    """What ``few_rows::describe`` says of the kernel for up to ``rows`` rows."""
    bn, bk = (64, 128) if rows == 16 else (128, 64)
    return Facts(
        f"loraxs_few_rows_{rows}_{ELEMENTS[dtype]}_{direction}", "few-rows", direction,
        bm=rows, bn=bn, bk=bk, br=bn, cr=16, di=64, dj=64, dm=64, db_columns=64, threads=2 * bn,
        shared=4 * (bn + rows) * bk * 2, element=str(dtype).removeprefix("torch."),
    )  # fmt: skip


@dataclass
class Case(Layer):
    """One layer, both passes; ``parts``: of K, at most."""

    rows: int
    k: int
    n: int
    rank: int
    dtype: torch.dtype = BF16
    core: torch.dtype = FP32
    parts: int = 2
    adapters: int | None = None
    ids: Tensor | None = None
    sort: bool = False
    scaling: float = oracle.S
    seed: int = 0
    views: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)

    def launch(self, direction: str, given: dict[str, Any]) -> Pass:
        f = facts(16 if self.rows <= 16 else 64, self.dtype, direction)
        depth = self.k if direction == "forward" else self.n
        parts = min(self.parts, ceil_div(depth, f.bk)) if given["w"] is not None else 1
        return self.executed(f, operands(f, **given, parts=parts))


# ---------------------------------------------------------------------------------------- costs


def flops(p: Pass) -> int:
    """2 M8 (N K + r K + N r), N and r as rows up to 16, ranges of K and r up to 16; dR."""
    f = p.operands.fields
    m, n, k, r = up(f["m"], 8), up(f["n"], 16), up(f["k"], 16), up(f["rank"], 16)
    has_d, has_w = "d" in p.operands.tensors, "w" in p.operands.tensors
    total = r * k + (n * k if has_d and has_w else 0) + (n * f["t_cols"] if has_d else 0)
    total *= 2 * m
    if "dr" in p.operands.tensors:
        rows = [f["m"]]
        if "ids" in p.operands.tensors:
            ids = p["ids"]
            rows = [int((ids == a).sum()) for a in range(f["adapters"])]
        total += sum(2 * up(n, p.facts.dm) * r * up(f["rank"], 8) for n in rows)
    return total


def least(p: Pass) -> int:
    """Bytes, if everything were read and written once."""
    sizes = {name: t.numel() * t.element_size() for name, t in p.operands.tensors.items()}
    scratch = ("flags", "bad_id", "partial", "order", "offsets", "core")
    return sum(size for name, size in sizes.items() if name not in scratch) + _cores(p)


def _cores(p: Pass) -> int:
    core = p["core"]
    rows = 1
    if "ids" in p.operands.tensors:
        rows = int(((p["ids"] >= 0) & (p["ids"] < p.operands.fields["adapters"])).sum())
    return rows * core.shape[-1] ** 2 * core.element_size()


def again(p: Pass, *, x: bool = True) -> int:
    """Bytes that the scheme reads or writes again, by design. ``x``: those of X included."""
    f, e = p.operands.fields, 2
    m, n, r, t = f["m"], f["n"], f["rank"], f["t_cols"]
    tiles, columns = f["col_tiles"], ceil_div(t, 32)
    total = tiles * m * t * e  # T, by every tile
    if "w" not in p.operands.tensors:
        total -= m * f["k"] * e * (tiles > 0) if x else 0
    if x:
        total += (f["col_tiles"] + f["slices"] - 1) * m * f["k"] * e
    if tiles and "bias" in p.operands.tensors:
        total += (m - 1) * n * e  # by every row
    if tiles:
        total += columns * m * r * e  # Q, by every item of T
    pairs = up(m, 2)
    if f["parts"] > 1:
        total += 2 * 4 * f["parts"] * up(n, 16) * pairs
    if f["slice_parts"] > 1:
        total += 2 * 4 * f["slice_parts"] * up(r, 16) * pairs
    if "ids" in p.operands.tensors:
        total += (columns - 1) * m * 8
    if "dr" in p.operands.tensors:
        tiles_of_dr = ceil_div(r, 64)
        total += (2 * tiles_of_dr - 1) * m * r * e
        if "ids" in p.operands.tensors:
            total += f["adapters"] * tiles_of_dr**2 * m * 8 * 2
    if "db" in p.operands.tensors:
        total += m * f["k"] * e
    return total
