"""Flags in global memory: how the CTAs of one launch hand work to each other.

Device code. The rules that make it safe:

* A CTA only waits for work whose ticket is lower than its own. Tickets are drawn in order, so the
  producer is running or done, whatever the number of resident CTAs and whatever their order.
* ``tl.debug_barrier()`` stands between the stores of all warps and the one thread that releases a
  flag: without it the stores of the other warps are not ordered before the flag.
* Data behind a flag is read with ``.cg``, past L1.
* All counters are zero between launches. The last CTA to leave sets them back; nobody can still
  read
  them then, and no second launch (a memset) is needed.

Layout of the buffer (int32): ``TICKET``, ``LEFT``, ``PUBLISHED``, then one "T is ready" counter per
row block, one "slices of Q are ready" counter per row block, one counter per tile of dR.
"""

from __future__ import annotations

import triton
import triton.language as tl

TICKET = tl.constexpr(0)
LEFT = tl.constexpr(1)
PUBLISHED = tl.constexpr(2)
#: Where the counters per row block begin.
FIXED_FLAGS = tl.constexpr(4)


@triton.jit
def draw(flags):
    """The next ticket."""
    return tl.atomic_add(flags + TICKET, 1, sem="relaxed")


@triton.jit
def release(flag):
    """Count one producer as done: everything its CTA stored is visible to who acquires the flag."""
    tl.debug_barrier()
    return tl.atomic_add(flag, 1, sem="release")


@triton.jit
def arrive(flag):
    """Like :func:`release`, for those who may be the last; returns how many came before."""
    tl.debug_barrier()
    return tl.atomic_add(flag, 1, sem="acq_rel")


@triton.jit
def wait(flag, count):
    """Until ``count`` producers have released the flag."""
    seen = tl.atomic_add(flag, 0, sem="acquire")
    while seen < count:
        seen = tl.atomic_add(flag, 0, sem="acquire")


@triton.jit
def leave(flags, count, BLOCK: tl.constexpr):
    """Leave the launch; the last CTA to do so zeroes all ``count`` flags."""
    tl.debug_barrier()
    if tl.atomic_add(flags + LEFT, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for i in range(0, count, BLOCK):
            at = i + tl.arange(0, BLOCK)
            tl.store(flags + at, tl.zeros((BLOCK,), tl.int32), mask=at < count)
