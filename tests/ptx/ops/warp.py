"""Exchanges between the threads of a warp: shuffles, votes, elections, reductions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.machine import RECONVERGE, Active, Function, Program
from tests.ptx.numeric import DTYPES, Array
from tests.ptx.ops import op, unknown
from tests.ptx.ops.operands import reader, two_results, writer
from tests.ptx.parser import Instruction


def member_mask(active: Active, members: Array) -> Array:
    """``[threads]``: whether the warp's member mask (of its first active lane) names the thread."""
    cta = active.cta
    out = np.zeros(cta.threads, np.bool_)
    for warp in active.warps.tolist():
        lane = int(active.lanes[np.searchsorted(active.lanes, warp * 32)])
        out[warp * 32 : warp * 32 + 32] = int(members[lane]) >> np.arange(32) & 1
    return out & cta.alive


def incomplete(active: Active, members: Array) -> bool:
    """Whether threads named in the member mask are missing."""
    if active.full:
        return False
    return bool((member_mask(active, members) & ~active.mask).any())


@op("shfl")
def shuffle(i: Instruction, program: Program) -> Function:
    """``shfl.sync.mode.b32 d|p, a, b, c, members``."""
    if len(i.mods) != 3 or i.mods[0] != "sync" or i.mods[1] not in ("up", "down", "bfly", "idx"):
        raise unknown(i)
    mode = i.mods[1]
    first, second = two_results(i.operands[0])
    put, put_valid = writer(first, "b32", program), writer(second, "pred", program)
    a, b, c, members = (reader(o, "u32", program) for o in i.operands[1:])
    thread = np.arange(program.threads)
    lane, warp = thread & 31, thread & ~31

    def run(active: Active) -> str | None:
        if incomplete(active, members(active)):
            return RECONVERGE
        shift = (b(active) & np.uint32(31)).astype(np.int64)
        control = c(active).astype(np.int64)
        clamp, segment = control & 31, control >> 8 & 31
        top = (lane & segment) | (clamp & ~segment)
        other = {
            "up": lane - shift, "down": lane + shift, "bfly": lane ^ shift,
            "idx": (lane & segment) | (shift & ~segment),
        }[mode]  # fmt: skip
        valid = other >= top if mode == "up" else other <= top
        put(active, a(active)[warp + np.where(valid, other, lane)])
        put_valid(active, valid)
        return None

    return run


def _per_warp(active: Active, mask: Array) -> Array:
    return mask.reshape(-1, 32)


@op("vote")
def vote(i: Instruction, program: Program) -> Function:
    """``vote.sync.all/any/uni/ballot``."""
    mode = i.mods[1] if len(i.mods) == 3 and i.mods[0] == "sync" else ""
    if mode not in ("all", "any", "uni", "ballot"):
        raise unknown(i)
    put = writer(i.operands[0], "b32" if mode == "ballot" else "pred", program)
    p, members = reader(i.operands[1], "pred", program), reader(i.operands[2], "u32", program)
    bit = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def run(active: Active) -> str | None:
        named = members(active)
        if incomplete(active, named):
            return RECONVERGE
        inside = (member_mask(active, named) & active.mask).reshape(-1, 32)
        value = p(active).reshape(-1, 32)
        some, every = (value & inside).any(1), (value | ~inside).all(1)
        if mode == "ballot":
            result = ((value & inside) * bit).sum(1).astype(np.uint32)
        else:
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        put(active, np.repeat(result, 32))
        return None

    return run


@op("activemask")
def active_mask(i: Instruction, program: Program) -> Function:
    """Which threads of the warp are here now."""
    put = writer(i.operands[0], "b32", program)
    bit = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def run(active: Active) -> None:
        here = (active.mask.reshape(-1, 32) * bit).sum(1).astype(np.uint32)
        put(active, np.repeat(here, 32))

    return run


@op("elect")
def elect(i: Instruction, program: Program) -> Function:
    """``elect.sync d|p, members``: the lowest member leads."""
    first, second = two_results(i.operands[0])
    put, put_leader = writer(first, "b32", program), writer(second, "pred", program)
    members = reader(i.operands[1], "u32", program)
    lane = np.arange(program.threads) & 31

    def run(active: Active) -> str | None:
        named = members(active)
        if incomplete(active, named):
            return RECONVERGE
        inside = member_mask(active, named).reshape(-1, 32)
        leader = np.repeat(inside.argmax(1), 32)
        put(active, leader.astype(np.uint32))
        put_leader(active, lane == leader)
        return None

    return run


@op("redux")
def reduce(i: Instruction, program: Program) -> Function:
    """``redux.sync.op.type``: a reduction over the members."""
    name, kind = i.mods[1], i.mods[-1]
    functions: dict[str, Callable[[Array], Array]] = {
        "add": np.add.reduce, "min": np.minimum.reduce, "max": np.maximum.reduce,
        "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce,
    }  # fmt: skip
    if name not in functions or kind not in ("u32", "s32", "b32"):
        raise unknown(i)
    put = writer(i.operands[0], kind, program)
    get, members = reader(i.operands[1], kind, program), reader(i.operands[2], "u32", program)

    def run(active: Active) -> str | None:
        named = members(active)
        if incomplete(active, named):
            return RECONVERGE
        inside = (member_mask(active, named) & active.mask).reshape(-1, 32)
        out = np.zeros((len(inside), 32), DTYPES[kind])
        for row, (values, chosen) in enumerate(
            zip(get(active).reshape(-1, 32), inside, strict=True)
        ):
            if chosen.any():
                out[row] = functions[name](values[chosen])
        put(active, out.reshape(-1))
        return None

    return run
