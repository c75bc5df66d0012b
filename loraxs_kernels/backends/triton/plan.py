"""Which scheme, tiles and depths a call gets: arithmetic on its sizes and the GPU's, nothing else.

There is no list of GPUs: what matters are the number of SMs, the shared memory of one CTA and the
compute capability (which decides the matrix instruction), and an unknown GPU has these too. A plan
is a pure function of :class:`Problem` and :class:`Gpu`, so the results do not change from run to
run and every plan can be compiled ahead of time, without a GPU. ``autotune.py`` corrects it on
request.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

RIDE_ALONG, RESIDENT, TICKET = 0, 1, 2
SCHEMES = ("ride-along", "resident", "ticket")

#: Rows up to which a call streams W at memory speed, and tiles are cut to suit that.
FEW_ROWS = 64

#: Ranks that ride along: beyond, Q R' in every tile's registers spills, and X A^T in every tile
#: costs more than any other way.
MAX_RIDE_ALONG_RANK = 32

#: What a tile pays to draw a ticket and to see a flag, in FLOPs of one SM: about a microsecond.
_HANDOVER = 4.0e6

#: A shrink tile is narrow: its products run at about this fraction of a square tile's speed.
_SHRINK_EFFICIENCY = 0.5

#: Instructions of a warp per step along K: for each 16 bytes that a thread copies by itself, and
#: for all copies by descriptors (choosing a thread, waiting for barriers). Counted in PTX of the
#: ticket scheme on sm_90, forward; the backward, whose W is transposed, issues more by itself.
_COPY_INSTRUCTIONS = 3
_DESCRIPTOR_INSTRUCTIONS = 16

#: Cycles until a CTA's first copy by a descriptor has fetched it: an estimate.
_DESCRIPTOR_FETCH = 1000

#: Philox words (one per element of a masked tile of X) that a thread may draw at a time in the
#: resident scheme with tcgen05. Seen in compiled kernels: 16 take 201 to 238 registers, 32 spill.
_WORDS_IN_A_LOOP = 16

#: Reading one row of X or W costs a tile about as much as multiplying it with so many of the other.
_ROW_COST = 24.0


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
    be needed). ``has_w``: whether D has the term X W^T. ``vectors``: whether X and W can be read 16
    bytes at a time (rows that start at multiples of 16 bytes). ``descriptors``: whether tensor
    descriptors can describe them (``backends/problem.py``).
    """

    M: int
    N: int
    K: int
    rank: int
    bytes: int
    has_d: bool = True
    has_w: bool = True
    vectors: bool = True
    descriptors: bool = False
    mask_input: bool = False
    mask_output: bool = False
    need_dR: bool = False
    need_db: bool = False
    per_row: bool = False
    adapters: int = 1


@dataclass(frozen=True)
class Plan:
    """How a problem is cut up; the names are those of the kernel's parameters.

    ``BM, BN, BK``: the output tile and the step along K. ``BR``: columns of Q computed at once.
    ``CM, CL``: rows
    and columns of the core product. ``CR``: step of T B'^T along the rank. ``GROUP_M``: row blocks
    walked together. ``parts``: CTAs that share a row block (resident). ``DI, DJ, DM``: tile of dR
    and step along the rows; ``chunks``: how many CTAs share a tile of dR. ``DB_M, DB_N``: tile of
    the column sums. ``tma``: tiles of X, W and A come by tensor descriptors (the copy engine of
    compute capability 9.0 and up), not by the threads' own loads.
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
    tma: bool = False

    def describe(self) -> str:
        """One line for people."""
        name = SCHEMES[self.scheme]
        copies = ", TMA" if self.tma else ""
        sizes = f"{self.BM}x{self.BN}x{self.BK}"
        return f"{name} {sizes}, {self.stages} stages, {self.warps} warps{copies}"


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


def _tile(p: Problem, gpu: Gpu, scheme: int) -> tuple[int, int, int, int]:
    """``(BM, BN, BK, warps)``: the largest tile of which every SM still gets one.

    Which tiles there are is a matter of registers (the compiled kernels are gated on zero spills):
    with wgmma or tcgen05 the operands stay in shared memory and the accumulator may take 128 of a
    thread's registers. Otherwise the operands pass through registers, float32 ones as two halves
    (tf32x3); columns of the output that Philox masks, loads that are not 16 bytes wide, and a loop
    over tiles (resident) need registers too. With tcgen05 that loop leaves room for few Philox
    words at a time: a shorter BK draws fewer.
    """
    if p.M <= FEW_ROWS:
        # W is streamed once, by as many CTAs as there are SMs; long steps keep bytes in flight.
        BM = max(16, 1 << (p.M - 1).bit_length())
        BN = 64 if 64 * gpu.sms <= p.N else 32
        return BM, BN, (256 if p.vectors else 64) // p.bytes, 4
    if not p.has_d:
        return 64, 64, 128 // p.bytes, 4
    from_shared = 9 <= gpu.arch // 10 <= 11
    shapes = [(128, 256, 8), (128, 128, 8), (64, 128, 8), (64, 64, 4)]
    largest = 256 if from_shared and p.has_w and p.bytes == 2 and scheme != RESIDENT else 128
    if (p.bytes == 4 and (not from_shared or p.mask_output or scheme == RESIDENT)) or not p.vectors:
        shapes = shapes[3:]
    elif p.mask_output:
        shapes = shapes[2:]
    fitting = [shape for shape in shapes if shape[1] <= largest]
    filling = (s for s in fitting if ceil_div(p.M, s[0]) * ceil_div(p.N, s[1]) >= gpu.sms)
    BM, BN, warps = next(filling, fitting[-1])
    BK = (128 if from_shared and p.vectors else 64) // p.bytes
    if scheme == RESIDENT and p.mask_input and 10 <= gpu.arch // 10 <= 11:
        BK = min(BK, _WORDS_IN_A_LOOP * 32 * warps // BM)
    return BM, BN, BK, warps


def _fit(p: Problem, gpu: Gpu, plan: Plan) -> Plan | None:
    """The plan with as many stages as shared memory holds, with shorter ones if need be."""
    for BK in (plan.BK, plan.BK // 2, plan.BK // 4):
        for stages in (4, 3, 2):
            deep = replace(plan, BK=BK, stages=stages)
            if BK >= 16 and shared_bytes(p, deep) <= gpu.shared - 2048:
                return deep
    return None


def copies_by_descriptors(p: Problem, gpu: Gpu, plan: Plan) -> bool:
    """Whether tensor descriptors save a tile more cycles than they cost it.

    What they save are issue slots of the warps that also issue the products, four per cycle. A tile
    that is small gives each thread few bytes to copy, and one with few steps along K cannot make up
    for the fetch.
    """
    if gpu.arch < 90 or not p.descriptors:
        return False
    wide = plan.BN if p.has_d and p.has_w else plan.BR
    copies = (plan.BM + wide) * plan.BK * p.bytes / (16 * 32 * plan.warps)
    saved = (_COPY_INSTRUCTIONS * copies - _DESCRIPTOR_INSTRUCTIONS) * plan.warps
    return ceil_div(p.K, plan.BK) * saved / 4 > _DESCRIPTOR_FETCH


def schemes(p: Problem) -> tuple[int, ...]:
    """The schemes that can compute ``p`` well.

    Riding along leaves T in no memory: it cannot mask the output (dropout's backward) without a
    second accumulator, and with a core per row it would gather the cores in every tile; masking the
    input, it would draw the mask in every tile. Without D there is no tile to ride along with. For
    few rows the time goes into reading, and only the ticket scheme reads A once. A float32 product
    in a loop over tiles (resident) spills registers.
    """
    if p.M <= FEW_ROWS and p.has_d:
        return (TICKET,)
    looped = (TICKET,) if p.bytes == 4 and p.has_w else (RESIDENT, TICKET)
    masked = p.mask_input or p.mask_output
    if masked or p.per_row or not p.has_d or p.rank > MAX_RIDE_ALONG_RANK:
        return looped
    return (RIDE_ALONG, *looped)


def cost(p: Problem, gpu: Gpu, plan: Plan) -> float:
    """FLOPs of the busiest SM, counting a handover as what could be computed meanwhile."""
    row_blocks = ceil_div(p.M, plan.BM)
    col_tiles = ceil_div(p.N, plan.BN) if p.has_d else 0
    width = plan.BN if p.has_w else 0
    step = 2.0 * plan.BM * p.K
    shrink = step * padded_rank(p.rank) / _SHRINK_EFFICIENCY
    tile = step * width * (1.0 + _ROW_COST / plan.BM + _ROW_COST / plan.BN)
    tile += 2.0 * plan.BM * plan.BN * padded_rank(p.rank)
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
    found = [plan for scheme in schemes(p) if (plan := _plan(p, gpu, scheme)) is not None]
    return sorted(found, key=lambda plan: cost(p, gpu, plan))


def _plan(p: Problem, gpu: Gpu, scheme: int) -> Plan | None:
    """One scheme's plan for ``p``, or ``None`` if it does not fit into shared memory."""
    BM, BN, BK, warps = _tile(p, gpu, scheme)
    padded = padded_rank(p.rank)
    # A step along the rank; float32 ones are halved, because tf32x3 keeps two halves of each.
    CR = min(padded, 128 // p.bytes)
    if scheme == RIDE_ALONG:
        BR = padded
    elif p.M <= FEW_ROWS:
        BR = 16
    else:
        BR = min(padded, 256 // p.bytes, BN)
    if p.per_row:
        CM, CL = 16, CR
    else:
        # 16 rows for each of 8 warps: with fewer, two would compute the same.
        CM, CL = min(BM, 128), min(CR, 32)
    plan = Plan(
        scheme, BM, BN, BK, BR, CM, CL, max(CR, BR) if scheme == RIDE_ALONG else CR,
        min(padded, 32), CR, 2, warps,
    )  # fmt: skip
    fitted = _fit(p, gpu, replace(plan, chunks=_chunks(p, gpu, plan)))
    if fitted is not None:
        fitted = replace(fitted, tma=copies_by_descriptors(p, gpu, fitted))
    if fitted is None or scheme != RESIDENT or not p.has_d:
        return fitted
    most = ceil_div(p.N, BN)
    parts = sorted({1, *(min(2**i, most) for i in range(1, 6))})
    return min((replace(fitted, parts=n) for n in parts), key=lambda plan: cost(p, gpu, plan))


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
