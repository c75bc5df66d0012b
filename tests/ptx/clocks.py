"""Happens-before between warps, by vector clocks.

Every warp of the grid is an actor with a row of clocks: ``row[a]`` is the latest moment of actor
``a`` that this warp has seen. A barrier joins the rows of the warps that take part; a release
stores a copy of the row at an address; an acquire of that address joins it in. An access is
ordered after a write by actor ``a`` at its moment ``t`` exactly when ``row[a] >= t``. The threads
of one warp count as one actor: missing order *within* a warp is not seen.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.numeric import Array


class Clocks:
    """The rows of the warps of one CTA. Column 0 stands for the host, whose writes all precede.

    The CTAs of a cluster have neighbouring actors. ``slot`` is the place of warp 0 among them: the
    state of shared memory, which the cluster shares, names a warp by it.
    """

    def __init__(self, cta: int, warps: int, ctas: int, rank: int = 0, cluster: int = 1):
        self.first = 1 + cta * warps  # the actor number of warp 0
        self.warps = warps
        self.slot = rank * warps
        self.slots = slice(self.first - self.slot, self.first - self.slot + cluster * warps)
        self.rows = np.zeros((warps, 1 + warps * ctas), np.int32)
        self.own = np.arange(self.first, self.first + warps)
        # Like rows, but only of what the others have read: an arrival without release.
        self.reads = np.zeros((warps, cluster * warps), np.int32)
        self.rows[np.arange(warps), self.own] = 1
        self.fenced: dict[int, Array] = {}  # by warp: its row at its last fence
        self.seen: dict[int, Array] = {}  # by warp: rows read without acquire since its last fence

    @property
    def local(self) -> Array:
        """What each warp has seen of the warps of its own cluster."""
        return self.rows[:, self.slots]

    @property
    def now(self) -> Array:
        """The own moment of each warp."""
        return self.rows[np.arange(self.warps), self.own]

    def _advance(self, warps: Array) -> None:
        self.rows[warps, self.own[warps]] += 1

    def barrier(self, arriving: Array, leaving: Array | None = None) -> None:
        """``leaving`` warps (default: the arriving ones) see all that the arriving ones did."""
        joined = self.rows[arriving].max(0)
        out = arriving if leaving is None else leaving
        self.rows[out] = np.maximum(self.rows[out], joined)
        self._advance(np.union1d(arriving, out))

    def snapshot(self, warp: int) -> Array:
        """A release: what the warp has done and seen; it moves on to a new moment."""
        row = self.rows[warp].copy()
        self._advance(np.array([warp]))
        return row

    def join(self, warp: int, row: Array) -> None:
        np.maximum(self.rows[warp], row, out=self.rows[warp])

    def join_reads(self, warp: int, row: Array) -> None:
        np.maximum(self.reads[warp], row[self.slots], out=self.reads[warp])

    def fence(self, warp: int) -> None:
        """Orders earlier accesses before later strong ones, and earlier strong reads before."""
        if warp in self.seen:
            self.join(warp, self.seen.pop(warp))
        self.fenced[warp] = self.snapshot(warp)

    def ordered(self, warp: Array, actor: Array, moment: Array) -> Array:
        """Whether ``moment`` of ``actor`` precedes the present of ``warp``, elementwise."""
        return self.rows[warp, actor] >= moment


class Releases:
    """What has been released at each address; shared by the CTAs of a launch."""

    def __init__(self) -> None:
        self._rows: dict[int, Array] = {}

    def access(
        self, clocks: Clocks, warp: int, address: int, *,
        reads: bool, writes: bool, acquire: bool, release: bool,
    ) -> None:  # fmt: skip
        """A strong access, in the order in which they happen."""
        row = self._rows.get(address)
        if reads and row is not None:
            if acquire:
                clocks.join(warp, row)
            else:
                seen = clocks.seen.get(warp)
                clocks.seen[warp] = row.copy() if seen is None else np.maximum(seen, row)
        if not writes:
            return
        mine = clocks.snapshot(warp) if release else clocks.fenced.get(warp)
        if reads and row is not None:  # a read-modify-write continues the chain of releases
            if mine is not None:
                self._rows[address] = np.maximum(row, mine)
        elif mine is not None:
            self._rows[address] = mine.copy()
        else:
            self._rows.pop(address, None)
