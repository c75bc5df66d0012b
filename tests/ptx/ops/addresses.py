"""Address operands, state spaces, and the checked accesses that all families share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.cluster import RANK_SHIFT
from tests.ptx.errors import GlobalRace, OutOfBounds, SharedRace, UnknownInstruction
from tests.ptx.machine import Active, Cta, Program
from tests.ptx.memory import BASE
from tests.ptx.numeric import UNSIGNED, Array
from tests.ptx.ops.operands import reader
from tests.ptx.parser import Instruction, Mem, Operand, Reg, Sym

# Windows of the generic address space.
SHARED_WINDOW = 0x0100_0000_0000
LOCAL_WINDOW = 0x0200_0000_0000


def address_reader(operand: Operand, program: Program) -> Callable[[Active], Array]:
    """Addresses (uint64) of all threads."""
    if not isinstance(operand, Mem):
        raise UnknownInstruction(f"operand {operand} where an address is needed")
    offset = np.uint64(operand.offset & 0xFFFF_FFFF_FFFF_FFFF)
    base = operand.base
    if base is None:
        fixed = np.full(program.threads, offset)
        return lambda active: fixed
    kind = (
        "u64"
        if isinstance(base, Sym) or (isinstance(base, Reg) and base.kind[1:] == "64")
        else "u32"
    )
    get = reader(base, kind, program)
    if kind == "u64":
        return lambda active: get(active) + offset
    shift = np.uint32(operand.offset & 0xFFFF_FFFF)
    return lambda active: (get(active) + shift).astype(np.uint64)


def space_of(instruction: Instruction) -> str:
    """The state space named by the modifiers; generic if none is.

    "shared" is the CTA's own shared memory, "cluster" that of any CTA of the cluster.
    """
    for mod in instruction.mods:
        space = mod.split("::")[0]
        if space in ("global", "shared", "param", "const", "local"):
            return "cluster" if mod == "shared::cluster" else space
    return "generic"


def split_generic(active: Active, addresses: Array) -> list[tuple[str, Active, Array]]:
    """Generic addresses of the active lanes by the space they fall in."""
    high = addresses >> np.uint64(40)
    spaces = {1: ("cluster", SHARED_WINDOW), 2: ("local", LOCAL_WINDOW)}
    found = []
    for value in np.unique(np.where(high > 2, 3, high)).tolist():
        space, window = spaces.get(value, ("global", 0))
        inside = (high == value) if value in spaces else (high > 2) | (high == value)
        lanes = active.lanes[inside]
        mask = np.zeros(active.cta.threads, np.bool_)
        mask[lanes] = True
        part = active if len(lanes) == len(active) else Active(active.cta, mask, False)
        found.append((space, part, addresses[inside] - np.uint64(window)))
    return found


def split_cluster(active: Active, addresses: Array) -> list[tuple[Cta, Active, Array]]:
    """Addresses of ``shared::cluster`` by the CTA whose memory they mean, as offsets in it."""
    ranks = addresses >> np.uint64(RANK_SHIFT)
    if not ranks.any():
        return [(active.cta, active, addresses)]
    found = []
    for rank in np.unique(ranks):
        inside = ranks == rank
        lanes, first = active.lanes[inside], int(np.argmax(inside))
        owner, _ = active.cta.cluster.owner(active, int(addresses[first]), int(lanes[0]))
        mask = np.zeros(active.cta.threads, np.bool_)
        mask[lanes] = True
        part = active if len(lanes) == len(active) else Active(active.cta, mask, False)
        found.append((owner, part, addresses[inside] & np.uint64((1 << RANK_SHIFT) - 1)))
    return found


def load_global(
    instruction: Instruction, active: Active, addresses: Array, unit: int, count: int, strong: bool
) -> Array:
    """``[lanes, count]`` values of ``unit`` bytes from global memory."""
    grid, lanes, size = active.cta.grid, active.lanes, unit * count
    offsets, writable = grid.memory.locate(addresses, size, lanes, write=False)
    if writable and not strong:
        grid.memory.check_read(active.cta.clocks, active.lane_warps, lanes, offsets, size)
    grid.report.load(instruction.line, instruction.text, active.lane_warps, addresses, size)
    index = offsets // unit
    return grid.memory.units[unit][index[:, None] + np.arange(count)]


def store_global(
    instruction: Instruction, active: Active, addresses: Array, values: Array, strong: bool
) -> None:
    """Store ``values[lanes, count]``."""
    grid, lanes = active.cta.grid, active.lanes
    unit, count = values.dtype.itemsize, values.shape[1]
    memory, size = grid.memory, unit * count
    offsets, _ = memory.locate(addresses, size, lanes, write=True)
    index = offsets[:, None] // unit + np.arange(count)
    changed = (memory.units[unit][index] != values).any(1)
    memory.check_write(active.cta.clocks, active.lane_warps, lanes, offsets, size,
                       strong=strong, changed=changed)  # fmt: skip
    memory.units[unit][index] = values
    lost = (memory.units[unit][index] != values).any(1)
    if lost.any():
        bad = int(np.argmax(lost))
        raise GlobalRace("threads of one store write different values to one place",
                         thread=int(lanes[bad]), address=int(addresses[bad]))  # fmt: skip
    memory.count_writes(offsets, size)
    memory.changes += int(changed.any())
    grid.report.store(instruction.line, instruction.text, active.lane_warps, addresses, size)


def load_shared(
    instruction: Instruction, active: Active, addresses: Array, unit: int, count: int, strong: bool,
    owner: Cta | None = None,
) -> Array:  # fmt: skip
    """``[lanes, count]`` values of ``unit`` bytes from the shared memory of ``owner``, by default
    the CTA itself."""
    cta, lanes, size = active.cta, active.lanes, unit * count
    shared = (owner or cta).shared
    if owner is not None and owner is not cta:
        cta.cluster.touch(active, owner)
    offsets = shared.locate(addresses, size, lanes)
    cells = shared.cells(offsets, size)
    shared.check_read(cells, active.lane_warps, lanes, strong=strong, by=cta.clocks)
    if owner is None or owner is cta:
        cta.grid.report.shared(instruction.line, active.lane_warps, lanes, addresses, size)
    else:
        cta.grid.report.remote_load_bytes += size * len(lanes)
    return shared.units[unit][offsets[:, None] // unit + np.arange(count)]


def store_shared(
    instruction: Instruction, active: Active, addresses: Array, values: Array, strong: bool,
    owner: Cta | None = None,
) -> None:  # fmt: skip
    """Store ``values[lanes, count]``, by default in the CTA's own shared memory."""
    cta, lanes = active.cta, active.lanes
    unit, count = values.dtype.itemsize, values.shape[1]
    shared, size = (owner or cta).shared, unit * count
    if owner is not None and owner is not cta:
        cta.cluster.touch(active, owner)
    offsets = shared.locate(addresses, size, lanes)
    index = offsets[:, None] // unit + np.arange(count)
    cells = shared.cells(offsets, size)
    changed = None
    if not strong:
        changed = (shared.units[unit][index] != values).any(1)
    shared.check_write(cells, active.lane_warps, lanes, changed, strong=strong, by=cta.clocks)
    shared.units[unit][index] = values
    lost = (shared.units[unit][index] != values).any(1)
    if lost.any():
        bad = int(np.argmax(lost))
        raise SharedRace("threads of one store write different values to one place",
                         thread=int(lanes[bad]), address=int(addresses[bad]))  # fmt: skip
    shared.mark_written(cells, active.lane_warps, by=cta.clocks)
    if owner is None or owner is cta:
        cta.grid.report.shared(instruction.line, active.lane_warps, lanes, addresses, size)
    else:
        cta.grid.report.remote_store_bytes += size * len(lanes)
        cta.grid.memory.changes += 1


def local_index(active: Active, addresses: Array, unit: int, count: int) -> Array:
    """Indices into the flat local memory of the CTA."""
    each = active.cta.local.shape[1]
    if int(addresses.max()) + unit * count > each:
        raise OutOfBounds("local access", thread=int(active.lanes[0]), address=int(addresses.max()))
    flat = active.lanes * each + addresses.astype(np.int64)
    return flat[:, None] // unit + np.arange(count)


def load(
    space: str, instruction: Instruction, active: Active, addresses: Array, unit: int, count: int,
    strong: bool,
) -> Array:  # fmt: skip
    """A checked load of the active lanes from any space."""
    if space == "generic":
        out = np.zeros((len(active), count), UNSIGNED[unit])
        for inner, part, where in split_generic(active, addresses):
            rows = np.searchsorted(active.lanes, part.lanes)
            out[rows] = load(inner, instruction, part, where, unit, count, strong)
        return out
    if space == "cluster":
        out = np.zeros((len(active), count), UNSIGNED[unit])
        for owner, part, where in split_cluster(active, addresses):
            rows = np.searchsorted(active.lanes, part.lanes)
            out[rows] = load_shared(instruction, part, where, unit, count, strong, owner)
        return out
    if space == "shared":
        return load_shared(instruction, active, addresses, unit, count, strong)
    if space == "local":
        index = local_index(active, addresses, unit, count)
        return active.cta.local.reshape(-1).view(UNSIGNED[unit])[index]
    if space in ("param", "const"):
        offsets, _ = active.cta.grid.memory.locate(
            addresses, unit * count, active.lanes, write=False
        )
        return active.cta.grid.memory.units[unit][offsets[:, None] // unit + np.arange(count)]
    return load_global(instruction, active, addresses, unit, count, strong)


def store(
    space: str, instruction: Instruction, active: Active, addresses: Array, values: Array,
    strong: bool,
) -> None:  # fmt: skip
    """A checked store of the active lanes to any space."""
    if space == "generic":
        for inner, part, where in split_generic(active, addresses):
            rows = np.searchsorted(active.lanes, part.lanes)
            store(inner, instruction, part, where, values[rows], strong)
    elif space == "cluster":
        for owner, part, where in split_cluster(active, addresses):
            rows = np.searchsorted(active.lanes, part.lanes)
            store_shared(instruction, part, where, values[rows], strong, owner)
    elif space == "shared":
        store_shared(instruction, active, addresses, values, strong)
    elif space == "local":
        unit, count = values.dtype.itemsize, values.shape[1]
        index = local_index(active, addresses, unit, count)
        active.cta.local.reshape(-1).view(values.dtype)[index] = values
    elif space == "global":
        store_global(instruction, active, addresses, values, strong)
    else:
        raise UnknownInstruction(f"store to {space} memory")


def sync_key(space: str, active: Active, address: int) -> int:
    """The key under which releases at an address are kept."""
    if space == "generic" and address >> 40 == 1:
        space, address = "cluster", address - SHARED_WINDOW
    if space in ("shared", "cluster"):
        owner, offset = active.cta.cluster.owner(active, address, int(active.lanes[0]))
        return offset + SHARED_WINDOW + (owner.linear + 1 << 50)
    return (
        address
        if address >= BASE or space != "generic"
        else address + (active.cta.linear + 1 << 50)
    )
