"""What the tests of all CUDA kernels share: one layer, both passes, executed from PTX."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraxs_kernels import sorting
from tests import oracle
from tests.cuda_device import kernel
from tests.cuda_problem import Facts, ceil_div
from tests.cuda_ptx import Done, Operands, execute, flags_are_zero
from tests.ptx import Kernel
from tests.ptx.counters import SECTOR

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ELEMENTS = {BF16: "bf16", FP16: "fp16"}
DIRECTIONS = ("forward", "backward")


def up(n: int, step: int) -> int:
    """``n`` rounded up to a multiple of ``step``."""
    return ceil_div(n, step) * step


def kernel_of(f: Facts) -> Kernel:
    """From the built library, as compiled for the oldest architecture that runs it."""
    return kernel(f.name, 90 if f.family == "cluster" else 80)


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


class Layer:
    """Both passes of one layer. A family's case is a dataclass with these fields and its own.

    ``views``: what becomes of a tensor before a launch; ``how``: order, residency and skew of
    ``execute``.
    """

    rows: int
    k: int
    n: int
    rank: int
    dtype: torch.dtype
    core: torch.dtype
    adapters: int | None
    ids: Tensor | None
    sort: bool
    scaling: float
    seed: int
    views: dict[str, Any]
    how: dict[str, Any]

    def launch(self, direction: str, given: dict[str, Any]) -> Pass:
        """Execute the family's kernel for that direction."""
        raise NotImplementedError

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
        given = {
            "x": self._view("x", p.x), "w": self._view("w", p.weight), "a": self._view("a", p.A),
            "core": self._view("r", p.R).mT, "b": self._view("b", p.B), "bias": p.bias,
            "scaling": self.scaling,
        }  # fmt: skip
        return self.launch("forward", given | self._rows() | changes)

    def backward(self, p: oracle.Problem, q: Tensor, **changes: Any) -> Pass:
        given = {
            "x": self._view("g", p.grad_y), "w": self._view("w", p.weight).mT,
            "a": self._view("b", p.B).mT, "core": self._view("r", p.R),
            "b": self._view("a", p.A).mT, "scaling": self.scaling, "q": q,
            "need_dr": True, "need_db": True,
        }  # fmt: skip
        return self.launch("backward", given | self._rows() | changes)

    def executed(self, f: Facts, o: Operands) -> Pass:
        """The launch of one kernel on its operands, checked."""
        done = Pass(f, o, execute(kernel_of(f), f, o, **self.how))
        done.check()
        return done

    def run(self) -> tuple[oracle.Case, Pass, Pass]:
        p64, p = self.problems()
        forward = self.forward(p)
        backward = self.backward(p, forward["side"])
        got = {"y": forward["d"], "dx": backward["d"], "dR": backward["dr"], "db": backward["db"]}
        return (got, p64, p), forward, backward


def both(case: Layer, gate: Callable[[Pass], None]) -> tuple[Pass, Pass]:
    """Both passes, one launch each, beside the definition and within the gates."""
    computed, forward, backward = case.run()
    oracle.check(computed)
    for p in (forward, backward):
        gate(p)
    return forward, backward


def pitch(extra: int) -> Callable[[Tensor], Tensor]:
    """The same matrix with rows further apart."""

    def view(t: Tensor) -> Tensor:
        wide = t.new_full((t.shape[0], t.shape[1] + extra), float("nan"))
        wide[:, : t.shape[1]] = t
        return wide[:, : t.shape[1]]

    return view


def check_update(case: Layer, gate: Callable[[Pass], None]) -> None:
    """No W: D = base + s (Q R') B'^T; the base is read, not written, and has a pitch of its own."""
    p64, p = case.problems()
    done = case.forward(p, w=None, bias=None, base=pitch(8)(p.grad_y))
    gate(done)
    true, other = (
        b + oracle.S * ((q.x @ q.A.T).to(q.R.dtype) @ q.R.T).to(q.x.dtype) @ q.B.T
        for q, b in ((p64, p64.grad_y), (p, p.grad_y))
    )
    slack = 2 * torch.finfo(case.dtype).eps
    oracle.rule("y", true, done["d"].double(), [other.double()], slack)


def check_one_rounding(case: Layer) -> None:
    """A bias and a base whose sum is not a number of the type are rounded together, once (bf16)."""
    _, p = case.problems()
    for name in ("weight", "B"):
        setattr(p, name, getattr(p, name) * 0)
    p.bias[:], base = 1.0, torch.full((case.rows, case.n), 2.0**-9, dtype=BF16)
    base[:, 1::2] = 1.5 * 2.0**-8
    got = case.forward(p, base=base)["d"]
    assert torch.equal(got, (p.bias.float() + base.float()).to(BF16))
