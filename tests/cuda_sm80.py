"""The training kernels of csrc/cuda/sm80 on a GPU that is not there.

One layer, both passes, executed from PTX by ``tests/ptx``; and what a launch should cost: the
formulas of csrc/cuda/sm80/kernels.cuh, device/core.cuh and device/gradient.cuh, added up.
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
SCHEMES = ("ride_along", "ticket", "unaligned")


def facts(scheme: str, dtype: torch.dtype, direction: str) -> Facts:
    """What ``sm80::describe`` says of a kernel."""
    rides = scheme == "ride_along"
    return Facts(
        f"loraxs_sm80_{scheme}_{ELEMENTS[dtype]}_{direction}", "ride-along" if rides else "ticket",
        direction, bm=128, bn=128, bk=32, br=16 if rides else 64, cr=32, di=64, dj=64, dm=64,
        db_columns=64, threads=256, shared=69632, element=str(dtype).removeprefix("torch."),
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

    def __getitem__(self, name: str) -> Tensor:
        return self.operands[name]

    def __contains__(self, name: str) -> bool:
        return name in self.operands.tensors

    @property
    def flops(self) -> int:
        return self.done.report.tensor_flops

    @property
    def moved(self) -> int:
        """Global bytes loaded and stored. What several threads of a warp share moves once."""
        return sum(
            min(line.load_bytes, SECTOR * line.load_sectors)
            + min(line.store_bytes, SECTOR * line.store_sectors)
            for line in self.done.report.lines.values()
        )

    def main_loops(self) -> dict[int, str]:
        """The PTX lines of the innermost loops with matrix instructions."""
        k = kernel_of(self.facts)
        lines = k.module.text.splitlines()
        return {n: lines[n - 1] for n in k.main_loop_lines()}

    def conflicts(self) -> int:
        """Wavefronts beyond the needed ones, of loads from shared memory in the main loops."""
        return sum(
            self.done.report.bank_conflicts[n]
            for n, line in self.main_loops().items()
            if re.search(r"ld(matrix|\.shared)", line)
        )

    def check(self) -> None:
        """Written once, nothing else, flags left at zero, one launch."""
        assert self.done.report.launches == 1
        assert flags_are_zero(self.operands)
        for name in ("d", "side", "dr", "db", *(("t",) if "d" in self else ())):
            if name in self.done.buffers:
                assert (self.done.buffers[name].write_counts == 1).all(), name
                assert self.done.buffers[name].stray_writes == 0, name


@dataclass
class Case:
    """One layer, both passes. ``views``: what becomes of a tensor before a launch; ``how``: order,
    residency and skew of ``execute``.
    """

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

    def problems(self) -> tuple[oracle.Problem, oracle.Problem]:
        """In float64 and in the dtype; ids that no adapter has are -1."""
        p64 = oracle.problem(
            self.rows, self.k, self.n, self.rank, adapters=self.adapters, seed=self.seed
        )
        if self.adapters is not None:
            self.ids = p64.ids if self.ids is None else self.ids
            assert self.ids is not None
            there = (self.ids >= 0) & (self.ids < self.adapters)
            p64.ids = torch.where(there, self.ids, -1)
        return p64, p64.to(self.dtype, self.core)

    def _rows(self) -> dict[str, Tensor | None]:
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
        given: dict[str, Any] = {
            "x": self._view("x", p.x), "w": self._view("w", p.weight), "a": self._view("a", p.A),
            "core": self._view("r", p.R).mT, "b": self._view("b", p.B), "bias": p.bias,
            "scaling": self.scaling, "group": 2, "side_cols": self.rank,
        }  # fmt: skip
        return self._run("forward", given | self._rows() | changes)

    def backward(self, p: oracle.Problem, q: Tensor, **changes: Any) -> Pass:
        given: dict[str, Any] = {
            "x": self._view("g", p.grad_y), "w": self._view("w", p.weight).mT,
            "a": self._view("b", p.B).mT, "core": self._view("r", p.R),
            "b": self._view("a", p.A).mT, "scaling": self.scaling, "q": q,
            "need_dr": True, "need_db": True, "chunks": self.chunks, "group": 2,
        }  # fmt: skip
        return self._run("backward", given | self._rows() | changes)

    def _run(self, direction: str, given: dict[str, Any]) -> Pass:
        f = facts(self.scheme, self.dtype, direction)
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
        step = _up(ceil_div(n, f["chunks"]), 64)
        found += [max(0, min(step, n - c * step)) for c in range(f["chunks"])]
    return found


def flops(p: Pass) -> Flops:
    """The formulas of kernels.cuh, core.cuh and gradient.cuh. Scanned ids: up to 1024 rows."""
    f = p.operands.fields
    m, n, k, r8 = _up(f["m"], 128), _up(f["n"], 128), _up(f["k"], 32), _up(f["rank"], 8)
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
        dR = sum(2 * _up(s, 64) * _up(f["rank"], 16) * r8 for s in rows)
    again = (f["col_tiles"] - 1) * (shrink + core) if rides else 0
    return Flops(main + shrink + (core + expand if has_d else 0) + dR, again)


def _hits(p: Pass) -> list[bool]:
    f = p.operands.fields
    step = _up(ceil_div(f["m"], f["chunks"]), 64)
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
