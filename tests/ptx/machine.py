"""One CTA: its registers, its fragments of threads, and the loop that executes them.

All threads of a CTA run in one fragment, a program counter with a mask, as long as they agree;
NumPy then does an instruction for all of them at once. Where they disagree the fragment splits.
The fragment with the lowest program counter runs first, and fragments that meet are merged, so
that threads reconverge where the structure of the code ends. Any interleaving of the warps that
the barriers allow is a legal one: what depends on luck is caught by the checks of the memories.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.clocks import Clocks
from tests.ptx.cluster import Cluster
from tests.ptx.errors import DivergentWarp, PtxError, UninitialisedRegister
from tests.ptx.numeric import DTYPES, UNSIGNED, Array, size_of
from tests.ptx.parser import Instruction, Kernel, Reg
from tests.ptx.shared import Shared

if TYPE_CHECKING:
    from tests.ptx.scheduler import Grid

PATIENCE = 32  # loop iterations before a fragment lets others of its CTA go on

# What an instruction's function may return; None means: on to the next instruction.
WAIT = "wait"  # cannot go on yet; asked again later
SWITCH = "switch"  # done; let other CTAs come in
RECONVERGE = "reconverge"  # needs the rest of its warp


class Active:
    """The threads for which an instruction is executed."""

    __slots__ = ("_lanes", "_warps", "_whole", "cta", "full", "mask")

    def __init__(self, cta: Cta, mask: Array, full: bool):
        self.cta = cta
        self.mask = mask
        self.full = full
        self._lanes: Array | None = None
        self._warps: Array | None = None
        self._whole: bool | None = True if full else None

    @property
    def lanes(self) -> Array:
        """Linear thread numbers."""
        if self._lanes is None:
            self._lanes = np.flatnonzero(self.mask)
        return self._lanes

    @property
    def lane_warps(self) -> Array:
        """The warp of each of ``lanes``."""
        return self.lanes >> 5

    @property
    def warps(self) -> Array:
        """The warps that take part."""
        if self._warps is None:
            self._warps = np.unique(self.lanes >> 5)
        return self._warps

    @property
    def whole(self) -> bool:
        """Whether every warp that takes part does so with all its threads that still run."""
        if self._whole is None:
            alive = self.cta.alive.reshape(-1, 32)
            mask = self.mask.reshape(-1, 32)
            self._whole = bool((mask == alive).all(1)[self.warps].all())
        return self._whole

    def __len__(self) -> int:
        return len(self.lanes)


class Register:
    """Values of one register in all threads; arrays are replaced, never changed in place."""

    __slots__ = ("undefined", "value")

    def __init__(self, value: Array, undefined: Array | None):
        self.value = value
        self.undefined = undefined  # None: defined in every thread


class Fragment:
    """Threads that run together."""

    def __init__(self, active: Active, pc: int):
        self.active = active
        self.pc = pc
        self.waiting: str | None = None
        self.loops = 0  # backward branches since others last had a turn

    def ready(self, cta: Cta) -> bool:
        return self.waiting is None


Function = Callable[[Active], Any]


class Program:
    """A kernel's instructions, each bound to the function that executes it."""

    def __init__(self, kernel: Kernel, threads: int, symbols: dict[str, int], param: int):
        from tests.ptx.ops import build

        self.kernel = kernel
        self.threads = threads
        self.symbols = symbols  # addresses of variables, in their own space
        self.param_address = param
        self.code = kernel.instructions
        # Registers of wgmma operands: who else writes them must fence before the next wgmma.
        self.wgmma_registers: set[int] = set()
        self.functions: list[Function] = [build(i, self) for i in self.code]
        self.uses = [frozenset(_registers(i)) for i in self.code]
        self.writes_wgmma = [
            (frozenset(_registers(i)) & self.wgmma_registers) if i.name != "wgmma" else frozenset()
            for i in self.code
        ]


def _registers(instruction: Instruction) -> set[int]:
    found: set[int] = set()

    def visit(operand: Any) -> None:
        if isinstance(operand, Reg):
            found.add(operand.index)
        for name in ("items", "first", "second", "base", "operand", "coordinates"):
            child = getattr(operand, name, None)
            for one in child if isinstance(child, tuple) else (child,):
                if one is not None and not isinstance(one, (str, int)):
                    visit(one)

    for operand in instruction.operands:
        visit(operand)
    return found


class Cta:
    """One thread block while it is resident."""

    def __init__(
        self, grid: Grid, program: Program, index: tuple[int, int, int], linear: int,
        cluster: Cluster,
    ):  # fmt: skip
        self.grid = grid
        self.cluster = cluster
        self.rank = len(cluster.ctas)  # in the cluster
        self.program = program
        self.index = index
        self.linear = linear
        self.threads = program.threads
        self.warps = self.threads // 32
        self.clocks = Clocks(linear, self.warps, grid.ctas, self.rank, grid.cluster)
        self.shared = Shared(grid.shared_bytes, self.clocks, grid.cluster)
        self.local = np.zeros((self.threads, grid.local_bytes), np.uint8)
        self.alive = grid.real_threads.copy()
        nobody = np.ones(self.threads, np.bool_)
        zeros = {kind: np.zeros(self.threads, dtype) for kind, dtype in DTYPES.items()}
        self.regs = [
            Register(zeros[r.kind].view(_storage(r.kind)), nobody) for r in program.kernel.registers
        ]
        everybody = Active(self, self.alive.copy(), bool(self.alive.all()))
        self.fragments = [Fragment(everybody, 0)]
        self.state: dict[str, Any] = {}  # of the families of instructions: barriers, copies, ...
        self.counts: list[int] = [0] * len(program.code)
        self.stuck = False  # waits for other CTAs
        self.spins = 0  # backward branches since something last changed anywhere
        # Registers of running wgmmas: which threads must not read them, which not write them.
        self.pending_wgmma: dict[int, tuple[Array | None, Array]] = {}
        self.now: Instruction = program.code[0]
        cluster.join(self)

    @property
    def done(self) -> bool:
        return not self.fragments

    def run(self) -> bool:
        """Execute until a place where other CTAs may come in; False if nothing could be done."""
        worked = False
        asked: set[int] = set()
        while self.fragments:
            fragment = self._choose(asked)
            if fragment is None:
                return worked
            try:
                moved, leave = self._execute(fragment)
            except PtxError as fault:
                fault.locate(self.now.line, f"{self.now.text} (CTA {self.index})")
                raise
            worked |= moved
            if moved:
                asked.clear()
            else:
                asked.add(id(fragment))
            if leave:
                return worked
        return True

    def _choose(self, asked: set[int]) -> Fragment | None:
        """Merge fragments that stand at one place; the lowest that may do something."""
        if len(self.fragments) == 1:
            only = self.fragments[0]
            return None if id(only) in asked else only
        at: dict[int, Fragment] = {}
        for fragment in sorted(self.fragments, key=lambda f: f.pc):
            other = at.get(fragment.pc)
            if other is None or WAIT in (fragment.waiting, other.waiting):
                at.setdefault(fragment.pc, fragment)
            else:
                self._merge(other, fragment)
                asked.discard(id(other))
        free = [f for f in self.fragments if id(f) not in asked]
        patient = [f for f in free if f.loops < PATIENCE]
        if not patient:
            for f in free:
                f.loops = 0
        return min(patient or free, key=lambda f: f.pc, default=None)

    def _merge(self, one: Fragment, other: Fragment) -> None:
        mask = one.active.mask | other.active.mask
        one.active = Active(self, mask, bool(mask.all()))
        one.waiting = None
        self.fragments.remove(other)

    def _execute(self, fragment: Fragment) -> tuple[bool, bool]:
        """Run a fragment; (whether it moved, whether it is time for other CTAs)."""
        program = self.program
        code, functions, counts = program.code, program.functions, self.counts
        pc, start = fragment.pc, fragment.pc
        while True:
            instruction = self.now = code[pc]
            if instruction.is_label and pc != start and len(self.fragments) > 1:
                fragment.pc = pc
                return True, False  # perhaps to merge
            active = fragment.active
            guard = instruction.guard
            if guard is not None:
                active = self._guarded(active, guard, instruction.guard_negated)
            if instruction.name == "bra":
                counts[pc] += len(fragment.active.warps)
                back = instruction.target <= pc
                fragment.pc = pc
                pc = self._branch(fragment, active, instruction.target)
                if back and pc == instruction.target:
                    fragment.pc = pc
                    fragment.loops += 1
                    self.spins += 1
                    return True, True
                if len(self.fragments) > 1:
                    fragment.pc = pc
                    return True, False
                continue
            if guard is not None and not len(active):
                pc += 1
                continue
            if instruction.name in ("ret", "exit"):
                fragment.pc = pc + 1
                self._leave(fragment, active)
                return True, True
            if self.pending_wgmma:
                self._check_pending(pc, active)
            outcome = functions[pc](active)
            if outcome is None or outcome is SWITCH:
                counts[pc] += len(active.warps)
                if program.writes_wgmma[pc]:
                    self._note_wgmma_writes(pc, active)
                pc += 1
                fragment.waiting = None
                if outcome is SWITCH:
                    fragment.pc = pc
                    return True, True
                continue
            fragment.pc = pc
            fragment.waiting = outcome
            return pc != start, False

    def _guarded(self, active: Active, guard: Reg, negated: bool) -> Active:
        reg = self.regs[guard.index]
        if reg.undefined is not None:
            self.check_defined(reg, active, guard.name)
        wanted = ~reg.value if negated else reg.value
        mask = wanted & active.mask
        if active.full and mask.all():
            return active
        return Active(self, mask, False)

    def _branch(self, fragment: Fragment, taken: Active, target: int) -> int:
        """The next program counter of ``fragment``, which may split."""
        here = fragment.active
        if taken is here or len(taken) == len(here):
            return target
        if not len(taken):
            return fragment.pc + 1
        self.fragments.append(Fragment(taken, target))
        fragment.active = Active(self, here.mask & ~taken.mask, False)
        return fragment.pc + 1

    def _leave(self, fragment: Fragment, active: Active) -> None:
        self.alive &= ~active.mask
        rest = fragment.active.mask & ~active.mask
        if rest.any():
            fragment.active = Active(self, rest, False)
        else:
            self.fragments.remove(fragment)
        for other in self.fragments:
            other.active = Active(self, other.active.mask, False)

    def _check_pending(self, pc: int, active: Active) -> None:
        from tests.ptx.ops.wgmma import check_pending

        uses = self.program.uses[pc]
        if not uses.isdisjoint(self.pending_wgmma):
            check_pending(active, self.program.code[pc], uses)

    def _note_wgmma_writes(self, pc: int, active: Active) -> None:
        unfenced = self.state.setdefault("wgmma_unfenced", {})
        first = self.program.code[pc].operands[0]
        for reg in getattr(first, "items", (first,)):
            if isinstance(reg, Reg) and reg.index in self.program.wgmma_registers:
                unfenced[reg.index] = unfenced.get(reg.index, False) | active.mask

    def check_defined(self, reg: Register, active: Active, name: str) -> None:
        """Raise if one of the active threads never wrote the register."""
        if reg.undefined is not None:
            bad = reg.undefined & active.mask
            if bad.any():
                raise UninitialisedRegister(
                    f"register {name} read before it was written", thread=int(np.argmax(bad))
                )

    def blocked_at(self) -> str:
        """Where the threads stand, for a report of a deadlock."""
        places = []
        for f in self.fragments:
            i = self.program.code[f.pc]
            places.append(f"{len(f.active)} threads at line {i.line} ({i.text}) {f.waiting or ''}")
        return f"CTA {self.index}: " + "; ".join(places)

    def raise_if_divergent(self) -> None:
        """A part of a warp waits for the rest, which waits elsewhere or has left."""
        if any(f.waiting is None for f in self.fragments):
            return  # the rest may still be on its way
        for f in self.fragments:
            if f.waiting == RECONVERGE:
                i = self.program.code[f.pc]
                fault = DivergentWarp(
                    "the rest of the warp does not reach this", thread=int(f.active.lanes[0])
                )
                fault.locate(i.line, i.text)
                raise fault


def _storage(kind: str) -> type[np.generic]:
    return np.bool_ if kind == "pred" else UNSIGNED[size_of(kind)]


def storage(reg: Reg) -> type[np.generic]:
    """The array type in which a register is kept."""
    return _storage(reg.kind)
