"""Tensor maps: the 128-byte descriptors of tensor copies.

NVIDIA's bit layout is not public; the interpreter has its own. A map is made on the host by
``encode`` (the counterpart of ``cuTensorMapEncodeTiled``) and passed as a parameter of 128 bytes,
or by the kernel with ``tensormap.replace`` on zeroed shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptx.machine import Active, Function, Program
from tests.ptx.ops import op, unknown
from tests.ptx.ops.addresses import address_reader, load, split_generic, store
from tests.ptx.ops.operands import reader
from tests.ptx.parser import Imm, Instruction

SIZE = 128
RANKS = 5
LAYOUT = np.dtype([
    ("global_address", "<u8"), ("global_stride", "<u8", RANKS - 1), ("rank", "<u4"),
    ("elemtype", "<u4"), ("interleave_layout", "<u4"), ("swizzle_mode", "<u4"),
    ("fill_mode", "<u4"), ("box_dim", "<u4", RANKS),
    ("global_dim", "<u4", RANKS), ("element_stride", "<u4", RANKS),
])  # fmt: skip
ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)  # by elemtype
ELEMENT_TYPES = {"u8": 0, "u16": 1, "u32": 2, "s32": 3, "u64": 4, "s64": 5, "f16": 6, "f32": 7,
                 "f64": 9, "bf16": 10, "tf32": 11}  # fmt: skip
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes to code


@dataclass(frozen=True)
class TensorMap:
    """A decoded map; dimension 0 is the innermost. Strides in bytes."""

    address: int
    itemsize: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]  # of all dimensions, the innermost one's is the item size
    box: tuple[int, ...]
    swizzle: int  # code: 0 none, 1 to 3: 32, 64, 128 bytes


def encode(
    address: int, kind: str, dims: Sequence[int], strides: Sequence[int], box: Sequence[int],
    swizzle: int = 0,
) -> bytes:  # fmt: skip
    """A map. ``dims`` and ``box``: innermost first; ``strides``: bytes, of dimensions 1 and up;
    ``swizzle``: 0, 32, 64 or 128 bytes."""
    raw = np.zeros((), LAYOUT)
    raw["global_address"], raw["rank"] = address, len(dims) - 1
    raw["elemtype"], raw["swizzle_mode"] = ELEMENT_TYPES[kind], SWIZZLES[swizzle]
    raw["global_dim"][: len(dims)], raw["box_dim"][: len(box)] = dims, box
    raw["global_stride"][: len(strides)] = strides
    raw["element_stride"][: len(dims)] = 1
    return raw.tobytes().ljust(SIZE, b"\0")


def decode(raw: bytes, i: Instruction) -> TensorMap:
    """The fields; forms without a meaning here raise."""
    fields = np.frombuffer(raw[: LAYOUT.itemsize], LAYOUT)[0]
    rank = int(fields["rank"]) + 1
    if int(fields["interleave_layout"]) or int(fields["fill_mode"]) or rank > RANKS:
        raise unknown(i, "with an interleaved or NaN-filled tensor map")
    if (fields["element_stride"][:rank] != 1).any():
        raise unknown(i, "with element strides")
    itemsize = ELEMENT_BYTES[int(fields["elemtype"])]
    return TensorMap(
        int(fields["global_address"]), itemsize,
        tuple(fields["global_dim"][:rank].tolist()),
        (itemsize, *fields["global_stride"][: rank - 1].tolist()),
        tuple(fields["box_dim"][:rank].tolist()), int(fields["swizzle_mode"]),
    )  # fmt: skip


@op("tensormap.replace")
def replace(i: Instruction, program: Program) -> Function:
    """``tensormap.replace.tile.field.space.b1024.type [map] {, index}, value``."""
    name = i.mods[2] if i.mods[1] == "tile" else ""
    kind = i.mods[-1]
    if name not in (LAYOUT.names or ()) or i.mods[-2] != "b1024":
        raise unknown(i)
    dtype, start = LAYOUT.fields[name][:2]  # type: ignore[index]
    shift = 0
    if dtype.subdtype is not None:
        index = i.operands[1]
        if not isinstance(index, Imm):
            raise unknown(i)
        shift = int(index.value) * dtype.base.itemsize
    where = address_reader(i.operands[0], program)
    get = reader(i.operands[-1], kind, program)
    shared = any(m.startswith("shared") for m in i.mods)

    def run(active: Active) -> None:
        addresses = where(active)[active.lanes] + np.uint64(start + shift)
        values = get(active)[active.lanes][:, None]
        parts = [("shared", active, addresses)] if shared else split_generic(active, addresses)
        for space, part, at in parts:
            store(
                space, i, part, at, values[np.searchsorted(active.lanes, part.lanes)], strong=False
            )

    return run


@op("tensormap.cp_fenceproxy")
def publish(i: Instruction, program: Program) -> Function:
    """Copy a map from shared to global memory, 4 bytes per thread of the warp."""
    target, source = (address_reader(o, program) for o in i.operands[:2])
    size = i.operands[2]
    if not isinstance(size, Imm) or size.value != SIZE:
        raise unknown(i)

    def run(active: Active) -> None:
        lane = (active.lanes & 31).astype(np.uint64) * np.uint64(4)
        values = load("shared", i, active, source(active)[active.lanes] + lane, 4, 1, strong=False)
        store("global", i, active, target(active)[active.lanes] + lane, values, strong=False)

    return run
