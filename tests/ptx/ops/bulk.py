"""``cp.async.bulk``: copies by the asynchronous proxy, of plain bytes and of boxes of tensors.

Loads into shared memory land when their mbarrier's phase is asked for (see ``mbarrier.py``); stores
read shared memory until their bulk group has been waited for, so that nobody may overwrite it.
Elements of a box outside the tensor are zeros on a load and are dropped on a store. A multicast
load brings its box to the same place in several CTAs of the cluster and counts its bytes at the
mbarrier at the same place in each; other copies stay inside the CTA.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.ptx.errors import Misaligned, OutOfBounds
from tests.ptx.machine import Active, Cta, Function, Program
from tests.ptx.numeric import Array
from tests.ptx.ops import op, unknown
from tests.ptx.ops.addresses import address_reader
from tests.ptx.ops.mbarrier import find_in, offset_of
from tests.ptx.ops.operands import reader
from tests.ptx.ops.tensormap import SIZE as MAP_BYTES
from tests.ptx.ops.tensormap import TensorMap, decode
from tests.ptx.ops.wgmma import swizzled
from tests.ptx.parser import Imm, Instruction, Mem, Vec

SWIZZLE_BITS = (0, 1, 2, 3)  # by the map's code


@dataclass
class Stores:
    """Of a thread: shared cells that committed groups, and the open one, still read."""

    committed: list[list[Array]] = field(default_factory=list)
    issued: list[Array] = field(default_factory=list)


def _stores(cta: Cta, lane: int) -> Stores:
    found: Stores = cta.state.setdefault("bulk_stores", {}).setdefault(lane, Stores())
    return found


def _box(
    tensor: TensorMap, corner: list[int], target: int, lane: int
) -> tuple[Array, Array, Array]:
    """``(global addresses, whether inside, shared offsets)`` of a box's elements, in its order."""
    if tensor.address % 16 or any(s % 16 for s in tensor.strides[1:]):
        raise Misaligned("tensor map: address and strides must be multiples of 16",
                         thread=lane, address=tensor.address)  # fmt: skip
    if tensor.box[0] * tensor.itemsize % 16 or target % 128:
        raise Misaligned("tensor copy: rows must be multiples of 16 bytes, shared addresses of 128",
                         thread=lane, address=target)  # fmt: skip
    if tensor.swizzle and tensor.box[0] * tensor.itemsize > 16 << tensor.swizzle:
        raise Misaligned(
            "tensor copy: a row is wider than the swizzle", thread=lane, address=target
        )
    index = np.indices(tensor.box[::-1]).reshape(len(tensor.box), -1)[::-1]
    place = index + np.array(corner)[:, None]
    inside = ((place >= 0) & (place < np.array(tensor.dims)[:, None])).all(0)
    addresses = tensor.address + (place * np.array(tensor.strides)[:, None]).sum(0)
    linear = target + np.arange(index.shape[1]) * tensor.itemsize
    return addresses, inside, swizzled(linear, SWIZZLE_BITS[tensor.swizzle])


def _read_map(active: Active, address: int, lane: int, i: Instruction) -> TensorMap:
    memory = active.cta.grid.memory
    words = np.uint64(address) + np.arange(0, MAP_BYTES, 8, dtype=np.uint64)
    lanes = np.full(len(words), lane)
    offsets, writable = memory.locate(words, 8, lanes, write=False)
    if writable:
        memory.check_read(active.cta.clocks, lanes >> 5, lanes, offsets, 8)
    return decode(memory.data[int(offsets[0]) : int(offsets[0]) + MAP_BYTES].tobytes(), i)


def _fetch(active: Active, i: Instruction, addresses: Array, size: int, lane: int) -> Array:
    """Checked reads of global elements of ``size`` bytes, as rows of bytes."""
    cta = active.cta
    memory, report = cta.grid.memory, cta.grid.report
    if not len(addresses):
        return np.zeros((0, size), np.uint8)
    lanes = np.full(len(addresses), lane)
    offsets, writable = memory.locate(addresses.astype(np.uint64), size, lanes, write=False)
    if writable:
        memory.check_read(cta.clocks, lanes >> 5, lanes, offsets, size)
    report.bulk(i.line, i.text, addresses, size, load=True)
    return memory.data.reshape(-1, size)[offsets // size]


def _into_shared(
    active: Active, barrier_at: int, lane: int, targets: Array, data: Array, size: int,
    owner: Cta | None = None,
) -> None:  # fmt: skip
    """Put rows of bytes under way to shared offsets, to be counted by an mbarrier, both in the
    shared memory of ``owner``, by default the CTA itself."""
    cta = active.cta
    owner = owner or cta
    shared = owner.shared
    barrier = find_in(active, owner, offset_of(barrier_at), lane)
    lanes = np.full(len(targets), lane)
    shared.locate(targets.astype(np.uint64), size, lanes)
    cells = shared.cells(targets, size)
    shared.check_write(cells, lanes >> 5, lanes, None, by=cta.clocks)
    shared.mark_flying(cells)
    if owner is not cta:
        cta.grid.report.multicast_bytes += data.size
        cta.grid.memory.changes += 1
    moment = (cta.clocks.now[lane >> 5].astype(np.int64), cta.clocks.slot + (lane >> 5))
    barrier.release(cta.clocks.snapshot(lane >> 5))

    def land() -> None:
        shared.data.reshape(-1, size)[targets // size] = data
        shared.mark_landed(cells, *moment)

    barrier.copies.append((data.size, land))


def _from_shared(active: Active, lane: int, sources: Array, size: int) -> Array:
    """Rows of bytes read from shared memory until the group is waited for."""
    cta, shared = active.cta, active.cta.shared
    lanes = np.full(len(sources), lane)
    shared.locate(sources.astype(np.uint64), size, lanes)
    cells = shared.cells(sources, size)
    shared.check_read(cells, lanes >> 5, lanes, proxy=True)
    flat = np.unique(cells)
    shared.readers_running[flat] += 1
    _stores(cta, lane).issued.append(flat)
    return shared.data.reshape(-1, size)[sources // size]


def _to_global(active: Active, i: Instruction, lane: int, addresses: Array, rows: Array) -> None:
    if not len(addresses):
        return
    cta, size = active.cta, rows.shape[1]
    memory = cta.grid.memory
    lanes = np.full(len(addresses), lane)
    offsets, _ = memory.locate(addresses.astype(np.uint64), size, lanes, write=True)
    memory.check_write(cta.clocks, lanes >> 5, lanes, offsets, size)
    memory.data.reshape(-1, size)[offsets // size] = rows
    memory.count_writes(offsets, size)
    memory.changes += 1
    cta.grid.report.bulk(i.line, i.text, addresses, size, load=False)


def _targets(active: Active, mask: int | None, lane: int) -> list[Cta]:
    """The CTAs that a mask names by their ranks; without a mask the CTA itself."""
    ctas = active.cta.cluster.ctas
    if mask is None:
        return [active.cta]
    if not mask or int(mask) >> len(ctas):
        raise OutOfBounds(f"multicast mask {int(mask):#x} in a cluster of {len(ctas)}", thread=lane)
    return [cta for cta in ctas if int(mask) >> cta.rank & 1]


@op("cp.async.bulk.tensor")
def tensor_copy(i: Instruction, program: Program) -> Function:
    """``cp.async.bulk.tensor.Nd``: a box, global to shared by mbarrier or back by bulk group."""
    known = ("async", "bulk", "tensor", "tile", "global", "L2::cache_hint", "bulk_group",
             "mbarrier::complete_tx::bytes", "shared::cta", "shared::cluster",
             "multicast::cluster", *(f"{n}d" for n in range(1, 6)))  # fmt: skip
    if not set(i.mods) <= set(known):
        raise unknown(i)
    loads = i.has("mbarrier::complete_tx::bytes")
    box, plain = (i.operands[1], i.operands[0]) if loads else (i.operands[0], i.operands[1])
    if not isinstance(box, Mem) or not isinstance(box.coordinates, Vec):
        raise unknown(i, "without coordinates")
    get_map = address_reader(Mem(box.base, box.offset), program)
    get_corner = [reader(c, "s32", program) for c in box.coordinates.items]
    get_shared = address_reader(plain, program)
    get_barrier = address_reader(i.operands[2], program) if loads else None
    multicast = i.has("multicast::cluster")
    if multicast and not loads:
        raise unknown(i)
    get_mask = reader(i.operands[3], "u16", program) if multicast else None

    def run(active: Active) -> None:
        maps, places = get_map(active), get_shared(active)
        corners = [get(active) for get in get_corner]
        barriers = get_barrier(active) if get_barrier else None
        for lane in active.lanes.tolist():
            tensor = _read_map(active, int(maps[lane]), lane, i)
            if len(corners) != len(tensor.dims):
                raise unknown(i, f"on a tensor of rank {len(tensor.dims)}")
            corner = [int(c[lane]) for c in corners]
            at = offset_of(int(places[lane]))
            addresses, inside, offsets = _box(tensor, corner, at, lane)
            if barriers is not None:
                data = np.zeros((len(offsets), tensor.itemsize), np.uint8)
                data[inside] = _fetch(active, i, addresses[inside], tensor.itemsize, lane)
                for owner in _targets(active, get_mask(active)[lane] if get_mask else None, lane):
                    _into_shared(active, int(barriers[lane]), lane, offsets, data,
                                 tensor.itemsize, owner)  # fmt: skip
            else:
                data = _from_shared(active, lane, offsets, tensor.itemsize)
                _to_global(active, i, lane, addresses[inside], data[inside])

    return run


@op("cp.async.bulk")
def plain_copy(i: Instruction, program: Program) -> Function:
    """``cp.async.bulk``: contiguous bytes, a multiple of 16, both ends aligned to 16."""
    known = ("async", "bulk", "global", "L2::cache_hint", "bulk_group",
             "mbarrier::complete_tx::bytes", "shared::cta", "shared::cluster")  # fmt: skip
    if not set(i.mods) <= set(known):
        raise unknown(i)
    loads = i.has("mbarrier::complete_tx::bytes")
    if loads and not i.has("global"):
        raise unknown(i, "between shared memories")
    get_target, get_source = (address_reader(o, program) for o in i.operands[:2])
    get_size = reader(i.operands[2], "u32", program)
    get_barrier = address_reader(i.operands[3], program) if loads else None

    def run(active: Active) -> None:
        targets, sources, sizes = get_target(active), get_source(active), get_size(active)
        barriers = get_barrier(active) if get_barrier else None
        for lane in active.lanes.tolist():
            step = np.arange(0, int(sizes[lane]), 16)
            if int(sizes[lane]) % 16:
                raise Misaligned("bulk copy of a size that is no multiple of 16", thread=lane)
            if barriers is not None:
                data = _fetch(active, i, int(sources[lane]) + step, 16, lane)
                _into_shared(
                    active,
                    int(barriers[lane]),
                    lane,
                    offset_of(int(targets[lane])) + step,
                    data,
                    16,
                )
            else:
                data = _from_shared(active, lane, offset_of(int(sources[lane])) + step, 16)
                _to_global(active, i, lane, int(targets[lane]) + step, data)

    return run


@op("cp.async.bulk.commit_group")
def commit(i: Instruction, program: Program) -> Function:
    """The bulk stores of a thread since its last commit are a group."""

    def run(active: Active) -> None:
        for lane in active.lanes.tolist():
            stores = _stores(active.cta, lane)
            stores.committed.append(stores.issued)
            stores.issued = []

    return run


@op("cp.async.bulk.wait_group")
def wait(i: Instruction, program: Program) -> Function:
    """All but the newest n groups of the thread have read (and, without ``.read``, written)."""
    count = i.operands[0]
    if not isinstance(count, Imm):
        raise unknown(i)
    keep = int(count.value)

    def run(active: Active) -> None:
        cta = active.cta
        for lane in active.lanes.tolist():
            stores = _stores(cta, lane)
            done = stores.committed[: len(stores.committed) - keep]
            stores.committed = stores.committed[len(done) :]
            for cells in (c for group in done for c in group):
                cta.shared.readers_running[cells] -= 1
                cta.shared.mark_read(cells, lane >> 5)

    return run
