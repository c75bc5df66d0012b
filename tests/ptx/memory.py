"""Global memory: buffers between guard zones, with bounds, permissions, write counts and races."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
import torch

from tests.ptx.clocks import Clocks
from tests.ptx.errors import ArgumentError, GlobalRace, Misaligned, NotWritable, OutOfBounds
from tests.ptx.numeric import UNSIGNED, Array

BASE = 0x7F00_0000_0000
GUARD = 1 << 16
GRANULE = 2  # bytes whose last writer is remembered together


class Buffer:
    """A copy of an array in the interpreter's memory.

    A strided tensor brings the whole span of storage between its first and last element.
    """

    def __init__(self, memory: Memory, address: int, source: Any, name: str, writable: bool):
        self.address = address
        self.name = name
        self.writable = writable
        self._memory = memory
        self._tensor = source if isinstance(source, torch.Tensor) else None
        if self._tensor is not None:
            self.itemsize: int = source.element_size()
            self._strides = source.stride()
            pairs = zip(source.shape, self._strides, strict=True)
            length = 1 + sum((n - 1) * step for n, step in pairs) if source.numel() else 0
            flat = source.detach().cpu().as_strided((length,), (1,)).clone()
            data = flat.view(torch.uint8).numpy() if length else np.zeros(0, np.uint8)
        else:
            array = np.ascontiguousarray(source)
            self.itemsize = array.itemsize
            self._strides = tuple(step // array.itemsize for step in array.strides)
            self._dtype = array.dtype
            data = array.reshape(-1).view(np.uint8)
        self.shape = tuple(source.shape)
        self.nbytes = len(data)
        self._start = address - BASE
        memory.data[self._start : self._start + self.nbytes] = data
        self.span_write_counts = np.zeros(self.nbytes // self.itemsize, np.int32)

    def array(self) -> Any:
        """The present contents: a tensor if a tensor was given, else a NumPy array."""
        raw = self._memory.data[self._start : self._start + self.nbytes].copy()
        if self._tensor is None:
            return raw.view(self._dtype).reshape(self.shape)
        if not self.nbytes:
            return torch.empty_like(self._tensor, device="cpu")
        flat = torch.from_numpy(raw).view(self._tensor.dtype)
        return flat.as_strided(self.shape, self._strides).clone()

    @property
    def write_counts(self) -> Array:
        """How often each element was stored to by ordinary stores (atomics not counted)."""
        if not self.nbytes:
            return np.zeros(self.shape, np.int32)
        steps = [4 * step for step in self._strides]
        return np.lib.stride_tricks.as_strided(self.span_write_counts, self.shape, steps).copy()

    @property
    def stray_writes(self) -> int:
        """Stores into the span that hit no element (the gaps of a strided array)."""
        return int(self.span_write_counts.sum() - self.write_counts.sum())


class Memory:
    """The device's global memory. ``capacity`` is reserved, not used, until it is touched."""

    def __init__(self, capacity: int = 1 << 28):
        self.capacity = capacity
        self.data = np.zeros(capacity, np.uint8)
        self.units = {size: self.data.view(kind) for size, kind in UNSIGNED.items()}
        self.buffers: list[Buffer] = []
        self.symbols: dict[tuple[int, str], Buffer] = {}  # variables of modules
        self._starts: list[int] = []
        self._end = GUARD
        granules = capacity // GRANULE
        self._writer = np.zeros(granules, np.int32)
        self._written = np.zeros(granules, np.int32)
        self._reader = np.zeros(granules, np.int32)
        self._read = np.zeros(granules, np.int32)
        self.changes = 0  # stores that changed something: progress, for the scheduler

    def buffer(
        self, source: Any, name: str = "", writable: bool = True, align: int = 256, skew: int = 0
    ) -> Buffer:
        """Copy an array or tensor in; it gets a guard zone on either side.

        Its address is ``skew`` above a multiple of ``align``.
        """
        start = -(-self._end // align) * align + skew
        size = getattr(source, "nbytes", 0)
        if isinstance(source, torch.Tensor) and source.numel():
            pairs = zip(source.shape, source.stride(), strict=True)
            size = source.element_size() * (1 + sum((n - 1) * step for n, step in pairs))
        if start + size + GUARD > self.capacity:
            raise ArgumentError(f"buffer {name}: the memory of {self.capacity} bytes is full")
        made = Buffer(self, BASE + start, source, name or f"buffer{len(self.buffers)}", writable)
        self._end = start + made.nbytes + GUARD
        self.buffers.append(made)
        self._starts.append(made.address)
        return made

    def begin_launch(self) -> None:
        """A kernel starts after all that was done before it: forget who did it."""
        used = self._end // GRANULE
        for log in (self._writer, self._written, self._reader, self._read):
            log[:used] = 0

    def locate(
        self, addresses: Array, size: int, lanes: Array, *, write: bool
    ) -> tuple[Array, bool]:
        """Offsets into the memory after all checks; and whether anybody may write there."""
        if size > 1 and (addresses & np.uint64(size - 1)).any():
            bad = int(np.flatnonzero(addresses & np.uint64(size - 1))[0])
            raise Misaligned(
                f"global access of {size} bytes",
                thread=int(lanes[bad]),
                address=int(addresses[bad]),
            )
        low, high = int(addresses.min()), int(addresses.max()) + size
        at = bisect_right(self._starts, low) - 1
        if at >= 0 and high <= self._starts[at] + self.buffers[at].nbytes:
            writable = self.buffers[at].writable
            if write and not writable:
                raise NotWritable(
                    f"store into {self.buffers[at].name}", thread=int(lanes[0]), address=low
                )
        else:
            writable = self._locate_each(addresses, size, lanes, write)
        return (addresses - np.uint64(BASE)).astype(np.int64), writable

    def _locate_each(self, addresses: Array, size: int, lanes: Array, write: bool) -> bool:
        writable = False
        for address, lane in zip(addresses.tolist(), lanes.tolist(), strict=True):
            at = bisect_right(self._starts, address) - 1
            buffer = self.buffers[at] if at >= 0 else None
            if buffer is None or address + size > buffer.address + buffer.nbytes:
                raise OutOfBounds(self._describe(address, size), thread=lane, address=address)
            if write and not buffer.writable:
                raise NotWritable(f"store into {buffer.name}", thread=lane, address=address)
            writable |= buffer.writable
        return writable

    def _describe(self, address: int, size: int) -> str:
        near = min(
            self.buffers,
            key=lambda b: max(b.address - address, address - b.address - b.nbytes),
            default=None,
        )
        if near is None:
            return f"global access of {size} bytes, no buffer exists"
        if address < near.address:
            place = f"{near.address - address} bytes before {near.name}"
        else:
            place = f"{address - near.address} bytes into {near.name}, which has {near.nbytes}"
        return f"global access of {size} bytes, {place}"

    def count_writes(self, offsets: Array, size: int) -> None:
        """Count a store of ``size`` bytes at each offset on the elements it covers."""
        low = int(offsets.min())
        buffer = self.buffers[bisect_right(self._starts, low + BASE) - 1]
        start = buffer.address - BASE
        if int(offsets.max()) >= start + buffer.nbytes:
            for one in np.unique(self.owner(offsets)):
                self.count_writes(offsets[self.owner(offsets) == one], size)
            return
        first = (offsets - start) // buffer.itemsize
        if size > buffer.itemsize:
            first = (first[:, None] + np.arange(size // buffer.itemsize)).ravel()
        elif size < buffer.itemsize:
            first = first[(offsets - start) % buffer.itemsize == 0]
        np.add.at(buffer.span_write_counts, first, 1)

    def owner(self, offsets: Array) -> Array:
        """The index of the buffer of each offset."""
        return np.searchsorted(np.array(self._starts), offsets + BASE, "right") - 1

    def check_read(
        self, clocks: Clocks, warps: Array, lanes: Array, offsets: Array, size: int
    ) -> None:
        """Raise unless every read is ordered after the last write; remember the readers."""
        cells = offsets[:, None] // GRANULE + np.arange(max(1, size // GRANULE))
        row = warps[:, None]
        self._must(clocks.ordered(row, self._writer[cells], self._written[cells]), lanes, offsets,
                   "a read is not ordered after another warp's write")  # fmt: skip
        self._reader[cells] = clocks.own[row]
        self._read[cells] = clocks.now[row]

    def check_write(
        self, clocks: Clocks, warps: Array, lanes: Array, offsets: Array, size: int,
        *, strong: bool = False, changed: Array | None = None,
    ) -> None:  # fmt: skip
        """Raise unless every write is ordered after the last accesses; remember the writers.

        ``strong`` (atomics, volatile) writes are only remembered. ``changed`` tells which lanes
        change the memory: an unordered store of the value that stands there already is harmless.
        """
        cells = offsets[:, None] // GRANULE + np.arange(max(1, size // GRANULE))
        row = warps[:, None]
        if not strong:
            fine = clocks.ordered(row, self._writer[cells], self._written[cells])
            if changed is not None:
                fine |= ~changed[:, None]
            self._must(fine, lanes, offsets, "a store is not ordered after another warp's write")
            fine = clocks.ordered(row, self._reader[cells], self._read[cells])
            self._must(fine, lanes, offsets, "a store is not ordered after another warp's read")
        self._writer[cells] = clocks.own[row]
        self._written[cells] = clocks.now[row]

    def _must(self, fine: Array, lanes: Array, offsets: Array, what: str) -> None:
        if not fine.all():
            bad = int(np.flatnonzero(~fine.all(1))[0])
            name = self.buffers[int(self.owner(offsets[bad : bad + 1])[0])].name
            raise GlobalRace(
                f"{what} of {name}", thread=int(lanes[bad]), address=BASE + int(offsets[bad])
            )
