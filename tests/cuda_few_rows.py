"""The few-row kernels on a GPU that is not there: what a pass computes, and what it should cost.

The kernels of the built library are executed by ``tests/ptx``. ``least`` and ``again`` are the cost
formulas of csrc/cuda/few_rows/few_rows.cuh, added up for one launch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraxs_kernels import sorting
from tests import oracle
from tests.cuda_device import kernel
from tests.cuda_problem import Facts, ceil_div
from tests.cuda_ptx import Done, Operands, execute, flags_are_zero, operands
from tests.ptx import Kernel
from tests.ptx.counters import SECTOR

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ELEMENTS = {BF16: "bf16", FP16: "fp16"}
DIRECTIONS = ("forward", "backward")


def facts(rows: int, dtype: torch.dtype, direction: str) -> Facts:
    """What ``few_rows::describe`` says of the kernel for up to ``rows`` rows."""
    bn, bk = (64, 128) if rows == 16 else (128, 64)
    return Facts(
        f"loraxs_few_rows_{rows}_{ELEMENTS[dtype]}_{direction}", "few-rows", direction,
        bm=rows, bn=bn, bk=bk, br=bn, cr=16, di=64, dj=64, dm=64, db_columns=64, threads=2 * bn,
        shared=4 * (bn + rows) * bk * 2, element=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def kernel_of(f: Facts) -> Kernel:
    """As compiled for sm_80, from the built library."""
    return kernel(f.name, 80)


@dataclass
class Pass:
    """One launch that was executed."""

    facts: Facts
    operands: Operands
    done: Done

    @property
    def flops(self) -> int:
        return self.done.report.tensor_flops

    def __getitem__(self, name: str) -> Tensor:
        return self.operands[name]

    def moved(self) -> int:
        """Global bytes loaded and stored. What several threads of a warp share moves once."""
        return sum(
            min(line.load_bytes, SECTOR * line.load_sectors)
            + min(line.store_bytes, SECTOR * line.store_sectors)
            for line in self.done.report.lines.values()
        )

    def conflicts(self) -> int:
        """Wavefronts beyond the needed ones of the loads from shared memory in the main loops."""
        kernel = kernel_of(self.facts)
        lines = kernel.module.text.splitlines()
        return sum(
            self.done.report.bank_conflicts[n]
            for n in kernel.main_loop_lines()
            if re.search(r"ld(matrix|\.shared)", lines[n - 1])
        )

    def check(self) -> None:
        """Written once, nothing else, flags left at zero."""
        assert self.done.report.launches == 1
        assert flags_are_zero(self.operands)
        for name in ("d", "side", "t", "dr", "db"):
            if name in self.done.buffers and (name != "t" or "d" in self.done.buffers):
                assert (self.done.buffers[name].write_counts == 1).all(), name
                assert self.done.buffers[name].stray_writes == 0, name


@dataclass
class Case:
    """One layer, both passes. ``views``: what becomes of a tensor before a launch; ``how``: order,
    residency and skew of ``execute``.
    """

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

    @property
    def kernel(self) -> int:
        return 16 if self.rows <= 16 else 64

    def problems(self) -> tuple[oracle.Problem, oracle.Problem]:
        """In float64 and in the dtype; ids that no adapter has are -1."""
        p64 = oracle.problem(
            self.rows, self.k, self.n, self.rank, adapters=self.adapters, seed=self.seed
        )
        if self.adapters is not None:
            if self.ids is None:
                self.ids = p64.ids
            assert self.ids is not None
            there = (self.ids >= 0) & (self.ids < self.adapters)
            p64.ids = torch.where(there, self.ids, -1)
        return p64, p64.to(self.dtype, self.core)

    def _sorted(self) -> dict[str, Tensor | None]:
        if self.adapters is None:
            return {}
        assert self.ids is not None
        order = offsets = None
        if self.sort:
            order, offsets = sorting.sort_ids(self.ids, self.adapters)
        return {"ids": self.ids, "order": order, "offsets": offsets}

    def _view(self, name: str, t: Tensor) -> Tensor:
        return self.views[name](t) if name in self.views else t

    def forward(self, p: oracle.Problem, **changes: Any) -> Pass:
        f = facts(self.kernel, self.dtype, "forward")
        given = {
            "x": self._view("x", p.x), "w": self._view("w", p.weight), "a": self._view("a", p.A),
            "core": self._view("r", p.R).mT, "b": self._view("b", p.B), "bias": p.bias,
            "scaling": self.scaling, "parts": self._parts(f, self.k),
        }  # fmt: skip
        return self._run(f, given | self._sorted() | changes)

    def backward(self, p: oracle.Problem, q: Tensor, **changes: Any) -> Pass:
        f = facts(self.kernel, self.dtype, "backward")
        given = {
            "x": self._view("g", p.grad_y), "w": self._view("w", p.weight).mT,
            "a": self._view("b", p.B).mT, "core": self._view("r", p.R),
            "b": self._view("a", p.A).mT, "scaling": self.scaling, "q": q,
            "need_dr": True, "need_db": True, "parts": self._parts(f, self.n),
        }  # fmt: skip
        return self._run(f, given | self._sorted() | changes)

    def _parts(self, f: Facts, depth: int) -> int:
        return min(self.parts, ceil_div(depth, f.bk))

    def _run(self, f: Facts, given: dict[str, Any]) -> Pass:
        if given.get("w", 0) is None:
            given["parts"] = 1
        o = operands(f, **given)
        done = Pass(f, o, execute(kernel_of(f), f, o, **self.how))
        done.check()
        return done

    def run(self) -> tuple[oracle.Case, Pass, Pass]:
        p64, p = self.problems()
        forward = self.forward(p)
        backward = self.backward(p, forward["side"])
        got = {"y": forward["d"], "dx": backward["d"], "dR": backward["dr"], "db": backward["db"]}
        return (got, p64, p), forward, backward


# ---------------------------------------------------------------------------------------- costs


def _up(n: int, step: int) -> int:
    return ceil_div(n, step) * step


def flops(p: Pass) -> int:
    """2 M8 (N K + r K + N r), N and r as rows up to 16, ranges of K and r up to 16; dR."""
    f = p.operands.fields
    m, n, k, r = _up(f["m"], 8), _up(f["n"], 16), _up(f["k"], 16), _up(f["rank"], 16)
    has_d, has_w = "d" in p.operands.tensors, "w" in p.operands.tensors
    total = r * k + (n * k if has_d and has_w else 0) + (n * f["t_cols"] if has_d else 0)
    total *= 2 * m
    if "dr" in p.operands.tensors:
        rows = [f["m"]]
        if "ids" in p.operands.tensors:
            ids = p["ids"]
            rows = [int((ids == a).sum()) for a in range(f["adapters"])]
        total += sum(2 * _up(n, p.facts.dm) * r * _up(f["rank"], 8) for n in rows)
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
    pairs = _up(m, 2)
    if f["parts"] > 1:
        total += 2 * 4 * f["parts"] * _up(n, 16) * pairs
    if f["slice_parts"] > 1:
        total += 2 * 4 * f["slice_parts"] * _up(r, 16) * pairs
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
