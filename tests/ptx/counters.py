"""What a launch did, counted: the profiler of a machine without a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from tests.ptx.numeric import Array

SECTOR = 32  # bytes


@dataclass
class LineTraffic:
    """Global or shared traffic of one PTX line."""

    text: str = ""
    load_bytes: int = 0
    store_bytes: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    widths: Counter[int] = field(default_factory=Counter)


@dataclass
class Report:
    """Counters of one launch.

    ``instructions`` counts warp instructions by full opcode (one warp executing it counts one).
    ``load_widths`` counts the loads of single threads by their bytes, ``cp.async`` included,
    loads of zero bytes left out. A sector is 32 bytes, counted once per warp and instruction.
    ``bank_conflicts`` maps a PTX line to its excess wavefronts: those beyond the number that the
    width of the access needs anyway. ``tensor_flops`` is 2·m·n·k per matrix instruction and warp.
    ``remote_load_bytes`` and ``remote_store_bytes`` are those of threads in the shared memory of
    other CTAs of their cluster, ``multicast_bytes`` what tensor copies brought to other CTAs than
    the issuing one (which alone counts as a global load).
    """

    instructions: Counter[str] = field(default_factory=Counter)
    instructions_by_line: Counter[int] = field(default_factory=Counter)
    tensor_flops: int = 0
    tensor_flops_by_line: Counter[int] = field(default_factory=Counter)
    global_load_bytes: int = 0
    global_store_bytes: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    atomics: int = 0
    load_widths: Counter[int] = field(default_factory=Counter)
    store_widths: Counter[int] = field(default_factory=Counter)
    bank_conflicts: Counter[int] = field(default_factory=Counter)
    shared_wavefronts: Counter[int] = field(default_factory=Counter)
    barriers: int = 0
    cluster_barriers: int = 0
    remote_load_bytes: int = 0
    remote_store_bytes: int = 0
    multicast_bytes: int = 0
    launches: int = 1
    ctas: int = 0
    lines: dict[int, LineTraffic] = field(default_factory=dict)

    def traffic(self, line: int, text: str) -> LineTraffic:
        made = self.lines.get(line)
        if made is None:
            made = self.lines[line] = LineTraffic(text)
        return made

    def load(
        self, line: int, text: str, warps: Array, addresses: Array, sizes: Array | int
    ) -> None:
        """Threads of ``warps`` load ``sizes`` bytes each from ``addresses``."""
        total, sectors, widths = _accesses(warps, addresses, sizes)
        self.global_load_bytes += total
        self.load_sectors += sectors
        self.load_widths.update(widths)
        entry = self.traffic(line, text)
        entry.load_bytes += total
        entry.load_sectors += sectors
        entry.widths.update(widths)

    def store(self, line: int, text: str, warps: Array, addresses: Array, size: int) -> None:
        """Threads of ``warps`` store ``size`` bytes each to ``addresses``."""
        total, sectors, widths = _accesses(warps, addresses, size)
        self.global_store_bytes += total
        self.store_sectors += sectors
        self.store_widths.update(widths)
        entry = self.traffic(line, text)
        entry.store_bytes += total
        entry.store_sectors += sectors
        entry.widths.update(widths)

    def bulk(self, line: int, text: str, addresses: Array, size: int, *, load: bool) -> None:
        """A bulk copy of elements of ``size`` bytes; no thread's width is involved."""
        total, sectors, _ = _accesses(np.zeros(len(addresses), np.int64), addresses, size)
        entry = self.traffic(line, text)
        if load:
            self.global_load_bytes += total
            self.load_sectors += sectors
            entry.load_bytes += total
            entry.load_sectors += sectors
        else:
            self.global_store_bytes += total
            self.store_sectors += sectors
            entry.store_bytes += total
            entry.store_sectors += sectors

    def shared(self, line: int, warps: Array, lanes: Array, addresses: Array, size: int) -> None:
        """A shared access of ``size`` bytes by ``lanes``: add up wavefronts and their excess."""
        base = int(addresses.min()) & ~127
        moved = addresses.astype(np.int64) - base
        wavefronts, needed = _wavefronts(
            size,
            warps.astype(np.int16).tobytes(),
            lanes.astype(np.int16).tobytes(),
            moved.tobytes(),
        )
        self.shared_wavefronts[line] += wavefronts
        if wavefronts > needed:
            self.bank_conflicts[line] += wavefronts - needed


def _accesses(
    warps: Array, addresses: Array, sizes: Array | int
) -> tuple[int, int, dict[int, int]]:
    if isinstance(sizes, np.ndarray):
        kept = sizes > 0
        warps, addresses, sizes = warps[kept], addresses[kept], sizes[kept]
        values, counts = np.unique(sizes, return_counts=True)
        widths = dict(zip(values.tolist(), counts.tolist(), strict=True))
        total = int(sizes.sum())
    else:
        widths = {sizes: len(addresses)}
        total = sizes * len(addresses)
    # An aligned access of at most 32 bytes lies in one sector.
    keys = np.sort((addresses.astype(np.int64) // SECTOR) * 64 + warps)
    sectors = int((keys[1:] != keys[:-1]).sum()) + 1 if len(keys) else 0
    return total, sectors, widths


@lru_cache(maxsize=4096)
def _wavefronts(size: int, warps: bytes, lanes: bytes, addresses: bytes) -> tuple[int, int]:
    """Wavefronts taken and needed: 32 banks of 4 bytes; one wavefront serves 128 bytes of lanes."""
    per_phase = 128 // max(4, size)
    lane = np.frombuffer(lanes, np.int16).astype(np.int64)
    phase = np.frombuffer(warps, np.int16).astype(np.int64) * 64 + lane % 32 // per_phase
    words = np.frombuffer(addresses, np.int64) // 4
    if size > 4:
        words = (words[:, None] + np.arange(size // 4)).ravel()
        phase = np.repeat(phase, size // 4)
    key = np.unique(phase * (1 << 32) + words)  # a word wanted by several lanes is read once
    phase, bank = key >> 32, key % 32
    load = np.unique(phase * 32 + bank, return_counts=True)
    phases, start = np.unique(load[0] // 32, return_index=True)
    return int(np.maximum.reduceat(load[1], start).sum()), len(phases)
