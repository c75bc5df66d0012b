"""What the compiler is told about a launch, and nothing it is not entitled to know.

A :class:`Specialisation` holds the types, the alignment facts and the compile-time constants of one
compiled kernel. The launcher and the ahead-of-time compile both make it here, so what is checked
without a GPU (vector width, registers, shared memory) is what runs on one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraxs_kernels.backends.triton.kernels import lora_xs_kernel

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

#: The kernel's parameters, in groups as ``kernels.py`` declares them.
POINTERS = (
    "x_ptr", "w_ptr", "base_ptr", "a_ptr", "core_ptr", "b_ptr", "bias_ptr", "d_ptr", "side_ptr",
    "spare_ptr", "t_ptr", "q_ptr", "dr_ptr", "partial_ptr", "db_ptr", "flags_ptr", "seed_ptr",
    "ids_ptr", "order_ptr", "offsets_ptr", "bad_ptr",
)  # fmt: skip
#: Tensor descriptors (TMA), or None.
DESCRIPTORS = ("x_desc", "w_desc", "a_desc")
NUMBERS = ("fraction", "before", "after", "dr_scale", "keep_scale", "keep_threshold")
SIZES = ("M", "N", "K", "rank", "adapters")
STRIDES = (
    "x_row", "x_col", "w_row", "w_col", "base_row", "base_col", "a_row", "a_col",
    "core_adapter", "core_row", "core_col", "b_row", "b_col", "side_row", "t_row", "t_cols",
    "q_row", "dropout_columns",
)  # fmt: skip
COUNTS = ("parts", "chunks", "db_items", "gemm_items", "dr_items", "flag_count")

#: All that are not compile-time constants, in the kernel's order.
ARGUMENTS = POINTERS + DESCRIPTORS + NUMBERS + SIZES + STRIDES + COUNTS

_UNUSED = ("unused", 1)
_NONE = ("none", 1)


@dataclass(frozen=True)
class Specialisation:
    """One compiled kernel.

    ``arguments``: for each run-time parameter its type and the power of two (at most 16) known to
    divide it; the type ``"one"`` is the constant 1, ``"unused"`` a pointer that is never followed,
    ``"none"`` a descriptor that is not there.
    ``constants``: the compile-time parameters.
    """

    arguments: tuple[tuple[str, int], ...]
    constants: tuple[tuple[str, Any], ...]
    stages: int
    warps: int


def _divisor(value: int) -> int:
    # 8 elements of 16 bits are one 16-byte vector, and so are 4 of 32 bits.
    return next(d for d in (16, 8, 4, 1) if value % d == 0)


def pointer_fact(t: Tensor | None) -> tuple[str, int]:
    """Type and alignment of a tensor argument."""
    return _UNUSED if t is None else (_TYPES[t.dtype], 16 if t.data_ptr() % 16 == 0 else 1)


def descriptor_fact(t: Tensor | None, block: tuple[int, int] | None) -> tuple[str, int]:
    """The type of a tensor descriptor, which the shape of its tiles is a part of."""
    if t is None or block is None:
        return _NONE
    return f"tensordesc<{_TYPES[t.dtype][1:]}[{block[0]},{block[1]}]>", 1


def integer_fact(value: int, *, stride: bool) -> tuple[str, int]:
    """Type and divisor of an integer argument; a stride of one is a constant."""
    if stride and value == 1:
        return ("one", 1)
    return ("i32" if -(2**31) <= value < 2**31 else "i64", _divisor(value))


def specialise(
    pointers: list[Tensor | None],
    descriptors: list[tuple[str, int]],
    integers: dict[str, int],
    constants: dict[str, Any],
    stages: int,
    warps: int,
) -> Specialisation:
    """The facts of one launch.

    Args:
        pointers: in the order of :data:`POINTERS`.
        descriptors: a :func:`descriptor_fact` for each of :data:`DESCRIPTORS`.
        integers: a value for each of :data:`SIZES`, :data:`STRIDES` and :data:`COUNTS`.
        constants: the compile-time parameters by name.
        stages, warps: depth of the K loop's pipeline, warps of a CTA.
    """
    facts = [pointer_fact(t) for t in pointers]
    facts += descriptors
    facts += [("fp32", 1)] * (len(NUMBERS) - 1) + [("i64", 1)]
    facts += [integer_fact(integers[n], stride=False) for n in SIZES]
    facts += [integer_fact(integers[n], stride=True) for n in STRIDES]
    # Counts take no part in addresses: nothing is gained by knowing more, and one kernel serves
    # all.
    facts += [("i32", 1)] * len(COUNTS)
    return Specialisation(tuple(facts), tuple(constants.items()), stages, warps)


def source(spec: Specialisation) -> ASTSource:
    """What :func:`triton.compile` compiles."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, (name, (kind, divisor)) in enumerate(zip(ARGUMENTS, spec.arguments, strict=True)):
        if kind in ("one", "none"):
            signature[name], constants[i,] = "constexpr", 1 if kind == "one" else None
            continue
        signature[name] = "*i8" if kind == "unused" else kind
        if divisor > 1:
            attributes[i,] = [["tt.divisibility", divisor]]
    for i, (name, value) in enumerate(spec.constants, len(ARGUMENTS)):
        signature[name], constants[i,] = "constexpr", value
    if tuple(signature) != tuple(lora_xs_kernel.arg_names):
        raise RuntimeError("specialise.py: parameters differ from those of lora_xs_kernel")
    return ASTSource(lora_xs_kernel, signature, constants, attributes)


@functools.lru_cache(maxsize=1024)
def compile_for(
    spec: Specialisation, backend: str, arch: int | str, warp_size: int, device: int = 0
) -> Any:
    """The compiled kernel, for a GPU that need not be there; kept on disk by Triton's own cache.

    ``device``: an object per device, because the loaded module belongs to one.
    """
    options = {"num_warps": spec.warps, "num_stages": spec.stages}
    if backend == "cuda":
        # Without a limit ptxas may spill a few registers to reach a higher occupancy.
        options["maxnreg"] = min(255, 65536 // (32 * spec.warps))
    target = GPUTarget(backend, arch, warp_size)
    return triton.compile(source(spec), target=target, options=options)
