"""The barrier of a cluster, and addresses in the shared memory of its CTAs."""

from __future__ import annotations

import numpy as np

from tests.ptx.cluster import RANK_SHIFT, address_in
from tests.ptx.errors import OutOfBounds
from tests.ptx.machine import RECONVERGE, WAIT, Active, Function, Program
from tests.ptx.ops import op, unknown
from tests.ptx.ops.addresses import SHARED_WINDOW
from tests.ptx.ops.operands import reader, writer
from tests.ptx.parser import Instruction


@op("barrier.cluster")
def cluster_barrier(i: Instruction, program: Program) -> Function:
    """``barrier.cluster.arrive{.release, .relaxed}`` and ``.wait{.acquire}``, also ``.aligned``."""
    verb, *rest = i.mods[1:] or ("",)
    known = {"arrive": {"release", "relaxed", "aligned"}, "wait": {"acquire", "aligned"}}
    if verb not in known or not set(rest) <= known[verb] or i.operands:
        raise unknown(i)
    aligned, release = "aligned" in rest, "relaxed" not in rest

    def run(active: Active) -> str | None:
        if aligned and not active.whole:
            return RECONVERGE
        cluster = active.cta.cluster
        if verb == "arrive":
            cluster.arrive(active, release=release)
            return None
        return None if cluster.wait(active, acquire=True) else WAIT

    return run


@op("mapa")
def map_address(i: Instruction, program: Program) -> Function:
    """``mapa{.shared::cluster}.u32/.u64 d, a, rank``: the place of ``a`` in another CTA.

    With the space named, ``a`` and ``d`` are addresses in it; without, they are generic.
    """
    kind = i.mods[-1]
    named = i.has("shared::cluster")
    if kind not in ("u32", "u64") or len(i.mods) != 1 + named or (kind == "u32" and not named):
        raise unknown(i)
    get, get_rank = reader(i.operands[1], kind, program), reader(i.operands[2], "u32", program)
    put = writer(i.operands[0], kind, program)
    window = 0 if named else SHARED_WINDOW

    def run(active: Active) -> None:
        values, ranks = get(active), get_rank(active)
        out = np.zeros_like(values)
        for lane in active.lanes.tolist():
            rank, offset = int(ranks[lane]), int(values[lane]) - window
            if rank >= len(active.cta.cluster.ctas) or offset < 0:
                raise OutOfBounds(f"mapa to CTA {rank} of a cluster of "
                                  f"{len(active.cta.cluster.ctas)}",
                                  thread=lane, address=int(values[lane]))  # fmt: skip
            out[lane] = address_in(rank, offset & (1 << RANK_SHIFT) - 1) + window
        put(active, out)

    return run


@op("getctarank")
def rank_of_address(i: Instruction, program: Program) -> Function:
    """``getctarank{.shared::cluster}.u32/.u64 d, a``: whose shared memory an address means."""
    kind = i.mods[-1]
    named = i.has("shared::cluster")
    if kind not in ("u32", "u64") or len(i.mods) != 1 + named or (kind == "u32" and not named):
        raise unknown(i)
    get, put = reader(i.operands[1], kind, program), writer(i.operands[0], "u32", program)
    window = 0 if named else SHARED_WINDOW

    def run(active: Active) -> None:
        out = np.zeros(program.threads, np.uint32)
        for lane in active.lanes.tolist():
            where = int(get(active)[lane]) - window
            out[lane] = active.cta.cluster.owner(active, where, lane)[0].rank
        put(active, out)

    return run
