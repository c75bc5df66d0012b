"""Shared memory of one CTA, with the state of every word.

All CTAs of a cluster may access it. ``by`` says who does: the clocks of the accessing CTA, whose
warps ``warps`` are; by default the CTA that owns the memory.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.clocks import Clocks
from tests.ptx.errors import (
    AsyncCopyHazard,
    Misaligned,
    MissingProxyFence,
    OutOfBounds,
    PtxError,
    SharedRace,
    UninitialisedShared,
    WgmmaHazard,
)
from tests.ptx.numeric import UNSIGNED, Array

BASE = 1024  # where a kernel's shared memory begins; the first KiB belongs to the system
GRANULE = 2  # bytes that share a state

DEFINED, FLYING, UNFENCED = 1, 2, 4
WARP_BITS = 10  # a cluster has at most 16 CTAs of 32 warps
WARP_MASK = (1 << WARP_BITS) - 1


class Shared:
    """Bytes and their state.

    For each granule: whether it was ever written, whether an asynchronous copy into it is under
    way, whether an ordinary store to it awaits ``fence.proxy.async``, how many running wgmmas
    read it, who wrote it last and when, and when each warp read it last.
    """

    def __init__(self, size: int, clocks: Clocks, cluster: int = 1):
        self.size = size
        self.clocks = clocks
        padded = BASE + -(-size // 16) * 16
        self.data = np.zeros(padded, np.uint8)
        self.units = {width: self.data.view(kind) for width, kind in UNSIGNED.items()}
        cells = padded // GRANULE
        self.flags = np.zeros(cells, np.uint8)
        self.readers_running = np.zeros(cells, np.int16)
        self.written = np.zeros(cells, np.int64)  # moment << WARP_BITS | warp
        self.read = np.zeros((cells, cluster * clocks.warps), np.int32)

    def locate(self, addresses: Array, size: int, lanes: Array) -> Array:
        """Offsets after checks of bounds and alignment."""
        offsets = addresses.astype(np.int64)
        if size > 1 and (offsets & (size - 1)).any():
            bad = int(np.flatnonzero(offsets & (size - 1))[0])
            raise Misaligned(
                f"shared access of {size} bytes", thread=int(lanes[bad]), address=int(offsets[bad])
            )
        if int(offsets.min()) < BASE or int(offsets.max()) + size > BASE + self.size:
            bad = int(np.flatnonzero((offsets < BASE) | (offsets + size > BASE + self.size))[0])
            raise OutOfBounds(
                f"shared access of {size} bytes; the CTA has {self.size} from {BASE:#x}",
                thread=int(lanes[bad]), address=int(offsets[bad]),
            )  # fmt: skip
        return offsets

    def cells(self, offsets: Array, size: int) -> Array:
        return offsets[:, None] // GRANULE + np.arange(max(1, size // GRANULE))

    def check_read(
        self, cells: Array, warps: Array, lanes: Array,
        *, proxy: bool = False, strong: bool = False, log: bool = True, by: Clocks | None = None,
    ) -> None:  # fmt: skip
        """Raise unless the cells (one row per lane) may be read by ``warps`` (one per lane).

        ``proxy``: by the async proxy. ``strong`` (atomic, volatile) accesses do not race.
        """
        flags = self.flags[cells]
        seen = flags & (DEFINED | FLYING)
        if (seen != DEFINED).any():
            if (seen & FLYING).any():
                self._raise(AsyncCopyHazard, "read of data whose copy was not waited for",
                            (seen & FLYING) == 0, cells, lanes)  # fmt: skip
            self._raise(UninitialisedShared, "read of shared memory nobody wrote",
                        (seen & DEFINED) != 0, cells, lanes)  # fmt: skip
        if proxy and (flags & UNFENCED).any():
            self._raise(MissingProxyFence, "the async proxy reads what no fence.proxy.async covers",
                        (flags & UNFENCED) == 0, cells, lanes)  # fmt: skip
        if strong:
            return
        clocks = by or self.clocks
        row = warps[:, None]
        written = self.written[cells]
        fine = clocks.local[row, written & WARP_MASK] >= written >> WARP_BITS
        if not fine.all():
            self._raise(SharedRace, "read of another warp's write with no barrier between",
                        fine, cells, lanes)  # fmt: skip
        if log:
            self.read[cells, clocks.slot + row] = clocks.now[row]

    def check_write(
        self, cells: Array, warps: Array, lanes: Array, changed: Array | None,
        *, strong: bool = False, by: Clocks | None = None,
    ) -> None:  # fmt: skip
        """Raise unless the cells may be overwritten.

        ``changed`` (per lane): whether the value differs from what stands there; an unordered
        store of the same value is harmless. None: take it to differ.
        """
        if (self.flags[cells] & FLYING).any():
            self._raise(AsyncCopyHazard, "overwrites the target of a copy not waited for",
                        (self.flags[cells] & FLYING) == 0, cells, lanes)  # fmt: skip
        if self.readers_running[cells].any():
            self._raise(WgmmaHazard, "overwrites an operand of a running asynchronous instruction",
                        self.readers_running[cells] == 0, cells, lanes)  # fmt: skip
        if strong:
            return
        local = (by or self.clocks).local
        row = warps[:, None]
        written = self.written[cells]
        fine = local[row, written & WARP_MASK] >= written >> WARP_BITS
        if changed is not None:
            fine |= ~changed[:, None]
        if not fine.all():
            self._raise(SharedRace, "overwrites another warp's write with no barrier between",
                        fine, cells, lanes)  # fmt: skip
        known = np.maximum(local, (by or self.clocks).reads)
        fine = (known[row] >= self.read[cells]).all(-1)
        if changed is not None:
            fine |= ~changed[:, None]
        if not fine.all():
            self._raise(SharedRace, "overwrites what another warp read with no barrier between",
                        fine, cells, lanes)  # fmt: skip

    def mark_written(
        self, cells: Array, warps: Array, *, proxy: bool = False, by: Clocks | None = None
    ) -> None:
        """The cells hold what ``warps`` wrote now."""
        clocks = by or self.clocks
        self.flags[cells] = DEFINED if proxy else DEFINED | UNFENCED
        row = warps[:, None]
        now = clocks.now[row].astype(np.int64)
        self.written[cells] = (now << WARP_BITS) | (clocks.slot + row)

    def mark_landed(self, cells: Array, moment: int, slot: int) -> None:
        """The cells hold what a bulk copy brought that the warp ``slot`` of the cluster issued at
        ``moment``."""
        self.flags[cells] = DEFINED
        self.written[cells] = (int(moment) << WARP_BITS) | slot

    def mark_read(self, cells: Array, warp: int) -> None:
        """A warp of the CTA itself has read the cells up to now."""
        self.read[cells, self.clocks.slot + warp] = self.clocks.now[warp]

    def mark_flying(self, cells: Array) -> None:
        self.flags[cells] |= FLYING

    def fence_proxy(self, warps: Array, by: Clocks | None = None) -> None:
        """fence.proxy.async: all that these warps have seen written is now visible to it."""
        waiting = np.flatnonzero(self.flags & UNFENCED)
        if waiting.size:
            written = self.written[waiting]
            local = (by or self.clocks).local[warps]
            seen = (local[:, written & WARP_MASK] >= written >> WARP_BITS).any(0)
            self.flags[waiting[seen]] &= np.uint8(~UNFENCED & 0xFF)

    def _raise(
        self, kind: type[PtxError], what: str, fine: Array, cells: Array, lanes: Array
    ) -> None:
        row, column = (int(v[0]) for v in np.nonzero(~fine))
        raise kind(what, thread=int(lanes[row]), address=int(cells[row, column]) * GRANULE)
