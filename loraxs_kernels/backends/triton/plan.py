"""Which scheme, tiles and depths a call gets: arithmetic on its sizes and the GPU's, nothing else.

There is no list of GPUs: what matters are the number of SMs, the shared memory of one CTA and the
compute capability (which decides the matrix instruction), and an unknown GPU has these too. A plan
is a pure function of :class:`Problem` and :class:`Gpu`, so the results do not change from run to run
and every plan can be compiled ahead of time, without a GPU. ``autotune.py`` corrects it on request.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

RIDE_ALONG, RESIDENT, TICKET = 0, 1, 2
SCHEMES = ("ride-along", "resident", "ticket")

#: Rows up to which a call streams W at memory speed, and tiles are cut to suit that.
FEW_ROWS = 64

#: Ranks that ride along: beyond, Q R' in every tile's registers spills, and X A^T in every tile costs
#: more than any other way.
MAX_RIDE_ALONG_RANK = 32

#: What a tile pays to draw a ticket and to see a flag, in FLOPs of one SM: about a microsecond.
_HANDOVER = 4.0e6

#: A shrink tile is narrow: its products run at about this fraction of a square tile's speed.
_SHRINK_EFFICIENCY = 0.5


@dataclass(frozen=True)
class Gpu:
    """What a plan depends on.

    ``arch``: compute capability times ten (90 for sm_90), or 0 for an AMD GPU. ``sms``: number of
    multiprocessors. ``shared``: bytes of shared memory one CTA may use.
    """

    arch: int
    sms: int
    shared: int


@dataclass(frozen=True)
class Problem:
    """One pass, in the roles of ``kernels.py``: ``X [M, K]``, ``W [N, K]``, ``D [M, N]``.

    ``bytes``: size of an element of X (2 or 4). ``has_d``: whether D is computed at all (dX may not
    be needed). ``has_w``: whether D has the term X W^T.
    """

    M: int
    N: int
    K: int
    rank: int
    bytes: int
    has_d: bool = True
    has_w: bool = True
    dropout: bool = False
    need_dR: bool = False
    need_db: bool = False
    per_row: bool = False
    adapters: int = 1


@dataclass(frozen=True)
class Plan:
    """How a problem is cut up; the names are those of the kernel's parameters.

    ``BM, BN, BK``: the output tile and the step along K. ``BR``: columns of Q computed at once.
    ``CM, CL``: rows
    and columns of the core product. ``CR``: step of T B'^T along the rank. ``GROUP_M``: row blocks walked together.
    ``parts``: CTAs that share a row block (resident). ``DI, DJ, DM``: tile of dR and step along the
    rows; ``chunks``: how many CTAs share a tile of dR. ``DB_M, DB_N``: tile of the column sums.
    """

    scheme: int
    BM: int
    BN: int
    BK: int
    BR: int
    CM: int
    CL: int
    CR: int
    DI: int
    DJ: int
    stages: int
    warps: int
    GROUP_M: int = 8
    parts: int = 1
    DM: int = 64
    chunks: int = 1
    DB_M: int = 64
    DB_N: int = 64

    def describe(self) -> str:
        """One line for people."""
        name = SCHEMES[self.scheme]
        return f"{name} {self.BM}x{self.BN}x{self.BK}, {self.stages} stages, {self.warps} warps"


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def padded_rank(rank: int) -> int:
    """The power of two, at least 16, that the kernel pads a rank to."""
    return max(16, 1 << (rank - 1).bit_length())


def shared_bytes(p: Problem, plan: Plan) -> int:
    """Shared memory of the K loop: ``stages`` tiles of X, W and, riding along, A."""
    side = plan.BR if plan.scheme == RIDE_ALONG else 0
    wide = max(plan.BN + side if p.has_d and p.has_w else side, plan.BR)
    return plan.stages * plan.BK * (plan.BM + wide) * p.bytes


def _tile(p: Problem, gpu: Gpu) -> tuple[int, int, int, int]:
    """``(BM, BN, BK, warps)``: the largest tile of which every SM still gets one."""
    if p.M <= FEW_ROWS:
        # W is streamed once, by as many CTAs as there are SMs; long steps keep bytes in flight.
        BM = max(16, 1 << (p.M - 1).bit_length())
        BN = 64 if p.N >= 64 * gpu.sms else 32
        return BM, BN, 256 // p.bytes, 4
    BK = 128 // p.bytes
    candidates = [(128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4)]
    if gpu.arch < 90 or p.bytes == 4:
        # Without wgmma both operands pass through registers, and so do the halves of tf32x3.
        candidates = candidates[1:]
        BK //= 2
    for BM, BN, warps in candidates:
        if ceil_div(p.M, BM) * ceil_div(p.N, BN) >= gpu.sms:
            return BM, BN, BK, warps
    BM, BN, warps = candidates[-1]
    return BM, BN, BK, warps


def _fit(p: Problem, gpu: Gpu, plan: Plan) -> Plan | None:
    """The plan with as many stages as shared memory holds (2 to 4), or ``None``."""
    for stages in range(4, 1, -1):
        deep = replace(plan, stages=stages)
        if shared_bytes(p, deep) <= gpu.shared - 2048:
            return deep
    return None


def schemes(p: Problem) -> tuple[int, ...]:
    """The schemes that can compute ``p``.

    Riding along leaves T in no memory: it cannot mask the output (dropout's backward) without a
    second accumulator, and with a core per row it would gather the cores in every tile. Without D
    there is no tile to ride along with.
    """
    if p.dropout or p.per_row or not p.has_d or p.rank > MAX_RIDE_ALONG_RANK:
        return (RESIDENT, TICKET)
    return (RIDE_ALONG, RESIDENT, TICKET)


def cost(p: Problem, gpu: Gpu, plan: Plan) -> float:
    """FLOPs of the busiest SM, counting a handover as what could be computed meanwhile."""
    row_blocks = ceil_div(p.M, plan.BM)
    col_tiles = ceil_div(p.N, plan.BN) if p.has_d else 0
    width = plan.BN if p.has_w else 0
    step = 2.0 * plan.BM * p.K
    shrink = step * padded_rank(p.rank) / _SHRINK_EFFICIENCY
    tile = step * width + 2.0 * plan.BM * plan.BN * padded_rank(p.rank)
    if plan.scheme == RIDE_ALONG:
        # The narrow product shares X's tile: it costs its FLOPs, no more.
        return ceil_div(row_blocks * col_tiles, gpu.sms) * (tile + step * plan.BR)
    if plan.scheme == RESIDENT:
        waves = ceil_div(row_blocks * plan.parts, gpu.sms)
        return waves * (shrink + ceil_div(col_tiles, plan.parts) * tile)
    waves = ceil_div(row_blocks * col_tiles, gpu.sms)
    return waves * (tile + _HANDOVER) + max(row_blocks / gpu.sms, 0.5) * shrink


def candidates(p: Problem, gpu: Gpu) -> list[Plan]:
    """Every scheme's plan for ``p`` that fits the GPU, cheapest first."""
    BM, BN, BK, warps = _tile(p, gpu)
    padded = padded_rank(p.rank)
    small = p.M <= FEW_ROWS
    CR = min(padded, 64)
    common = Plan(
        RESIDENT, BM, BN, BK, min(padded, 16 if small else 128, BN if BN >= 64 else 16),
        16 if p.per_row else BM if gpu.arch >= 90 else min(BM, 64), CR if p.per_row else min(CR, 32), CR, min(padded, 32), CR, 2, warps,
    )  # fmt: skip
    common = replace(common, chunks=_chunks(p, gpu, common))
    found: list[Plan] = []
    for scheme in schemes(p):
        plan = replace(common, scheme=scheme)
        if scheme == RIDE_ALONG:
            plan = replace(plan, BR=padded)
        fitted = _fit(p, gpu, plan)
        if fitted is None:
            continue
        if scheme == RESIDENT and p.has_d:
            most = ceil_div(p.N, BN)
            parts = {1, *(min(2**i, most) for i in range(1, 6))}
            fitted = min(
                (replace(fitted, parts=n) for n in sorted(parts)), key=lambda f: cost(p, gpu, f)
            )
        found.append(fitted)
    return sorted(found, key=lambda f: cost(p, gpu, f))


def _chunks(p: Problem, gpu: Gpu, plan: Plan) -> int:
    """How many CTAs share a tile of dR: enough to fill the GPU, at least four steps for each."""
    tiles = p.adapters * ceil_div(p.rank, plan.DI) * ceil_div(p.rank, plan.DJ)
    return max(1, min(gpu.sms // tiles, ceil_div(p.M, 4 * plan.DM)))


@functools.lru_cache(maxsize=4096)
def choose(p: Problem, gpu: Gpu) -> Plan:
    """The cheapest plan for ``p`` on ``gpu``.

    Raises:
        RuntimeError: no tile fits into the GPU's shared memory.
    """
    plans = candidates(p, gpu)
    if not plans:
        raise RuntimeError(
            f"backend 'triton': this GPU offers {gpu.shared} bytes of shared memory to a CTA, "
            "the smallest tile needs more; use backend='reference'"
        )
    return plans[0]
