"""Triton kernels: compile ahead of time, take the PTX, run it on tensors."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.ptx.counters import Report
from tests.ptx.errors import ArgumentError
from tests.ptx.memory import Buffer, Memory
from tests.ptx.ops.tensormap import SWIZZLES, encode
from tests.ptx.parser import Kernel, Module
from tests.ptx.scheduler import SPIN_LIMIT, launch


@dataclass
class Compiled:
    """A compiled kernel and what its launch needs.

    ``arguments``: name, type and known divisor of each run-time argument, in order; those that
    specialisation turned into constants are not among them.
    """

    kernel: Kernel
    arguments: list[tuple[str, str, int]]
    num_warps: int
    shared: int
    scratch_bytes: int  # of global memory, per CTA
    scratch_align: int
    asm: Mapping[str, Any]
    metadata: Any


@dataclass
class Run:
    """What a launch left: its counters, and the buffers by argument name."""

    report: Report
    buffers: dict[str, Buffer]
    memory: Memory


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    divisible: Mapping[str, int] | Collection[str] = (),
    *,
    arch: int = 80,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> Compiled:
    """Compile a ``@triton.jit`` function for a CUDA ``arch`` (80, 90, ...), with no GPU.

    ``signature``: the type of every run-time argument by name ("*bf16", "i32", "fp32");
    ``constexprs``: the values of the others; ``divisible``: arguments known to be multiples of 16
    (a mapping gives other divisors).
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        raise RuntimeError("compile_kernel needs a process without TRITON_INTERPRET")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constexprs or {})
    divisors = divisible if isinstance(divisible, Mapping) else dict.fromkeys(divisible, 16)
    for name in fn.arg_names:
        if (name in signature) == (name in constants):
            raise ArgumentError(f"{name}: expected either a type or a constant value")
    types = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    place = {name: (n,) for n, name in enumerate(fn.arg_names)}
    source = ASTSource(
        fn, types, {place[n]: v for n, v in constants.items()},
        {place[n]: [["tt.divisibility", d]] for n, d in divisors.items()},
    )  # fmt: skip
    target = GPUTarget("cuda", arch, 32)
    made = triton.compile(
        source, target=target, options=dict(num_warps=num_warps, num_stages=num_stages, **options)
    )
    return from_triton(made)


def from_triton(made: Any) -> Compiled:
    """Wrap what ``triton.compile`` returned for an ``ASTSource``."""
    source, metadata = made.src, made.metadata
    divisors = {
        key[0]: int(value)
        for key, facts in (source.attrs or {}).items()
        for fact, value in facts
        if fact == "tt.divisibility"
    }
    arguments = [
        (name, kind, divisors.get(n, 1))
        for n, (name, kind) in enumerate(source.signature.items())
        if kind != "constexpr" and (n,) not in source.constants
    ]
    kernel = Module(made.asm["ptx"]).kernels[metadata.name]
    return Compiled(
        kernel, arguments, metadata.num_warps, metadata.shared, metadata.global_scratch_size,
        metadata.global_scratch_align, made.asm, metadata,
    )  # fmt: skip


def run_kernel(
    compiled: Compiled,
    grid: Sequence[int],
    args: Mapping[str, Any] | Sequence[Any],
    *,
    readonly: Collection[str] = (),
    residency: int | None = None,
    order: Any = "linear",
    spin_limit: int = SPIN_LIMIT,
    memory: Memory | None = None,
) -> Run:
    """Run on tensors (or NumPy arrays) and numbers; written tensors receive the results.

    ``args``: by name, or all run-time arguments in order; None is a null pointer, a
    ``TensorDescriptor`` becomes a tensor map, as Triton's launcher makes it. ``readonly``:
    names of arguments whose storage must not be written. Tensors that share storage share it here;
    an address keeps its remainder modulo 16, and a divisor that the compilation assumed is checked.
    """
    names = [name for name, _, _ in compiled.arguments]
    given = dict(args) if isinstance(args, Mapping) else dict(zip(names, args, strict=True))
    if set(names) - set(given):
        raise ArgumentError(f"missing arguments: {sorted(set(names) - set(given))}")
    memory = memory or Memory()
    placed = _Placement(memory, {n: _storage_of(given[n]) for n in names}, readonly)
    maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    values: list[Any] = []
    for name, kind, divisor in compiled.arguments:
        if kind.startswith("tensordesc"):
            values += _descriptor(given[name], placed.address(name), next(maps))
            continue
        value = placed.address(name) if kind.startswith("*") else given[name]
        if divisor > 1 and value is not None and int(value) % divisor:
            raise ArgumentError(f"{name}: compiled for multiples of {divisor}, got {value}")
        values.append(0 if value is None else value)
    values += _scratch(compiled, memory, grid)
    report = launch(
        compiled.kernel, grid=grid, args=values, memory=memory, threads=32 * compiled.num_warps,
        shared_bytes=compiled.shared, residency=residency, order=order, spin_limit=spin_limit,
    )  # fmt: skip
    placed.copy_back()
    return Run(report, placed.buffers, memory)


def _descriptor(made: Any, address: int | None, meta: Mapping[str, Any]) -> list[Any]:
    """What a host-made descriptor is to the kernel: a tensor map, its shape, its strides."""
    if address is None or getattr(made, "padding", "zero") != "zero":
        raise ArgumentError("expected a descriptor of a tensor, padded with zeros")
    kind = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}[made.base.dtype]
    strides = [s * made.base.element_size() for s in made.strides]
    swizzle = {code: size for size, code in SWIZZLES.items()}[meta["swizzle"]]
    packed = encode(
        address, kind, made.shape[::-1], strides[-2::-1], meta["block_size"][::-1], swizzle
    )
    return [packed, *made.shape, *made.strides]


def _scratch(compiled: Compiled, memory: Memory, grid: Sequence[int]) -> list[int]:
    """The trailing pointers: global scratch (made here), profiling scratch (none)."""
    described = sum(k.count(",") + 1 for _, k, _ in compiled.arguments if k[:10] == "tensordesc")
    trailing = len(compiled.kernel.params) - len(compiled.arguments) - 2 * described
    if trailing != 2:
        raise ArgumentError(f"expected 2 scratch pointers after the arguments, found {trailing}")
    size = compiled.scratch_bytes * int(np.prod(grid))
    if not size:
        return [0, 0]
    align = max(256, compiled.scratch_align)
    return [memory.buffer(np.zeros(size, np.uint8), "global scratch", align=align).address, 0]


class _Placement:
    """Copies tensors into the interpreter's memory and back; one buffer per storage."""

    def __init__(self, memory: Memory, args: Mapping[str, Any], readonly: Collection[str]):
        self.buffers: dict[str, Buffer] = {}
        self._args = args
        self._offset: dict[str, int] = {}
        self._homes: dict[int, list[str]] = {}
        for name, value in args.items():
            if isinstance(value, np.ndarray | torch.Tensor):
                self._homes.setdefault(_storage(value), []).append(name)
        for names in self._homes.values():
            writable = not set(names) & set(readonly)
            value = args[names[0]]
            if len(names) == 1:
                skew = _address(value) % 16
                self.buffers[names[0]] = memory.buffer(value, names[0], writable, skew=skew)
                self._offset[names[0]] = 0
                continue
            whole = _whole(value)
            shared = memory.buffer(whole, "/".join(names), writable, skew=_address(whole) % 16)
            for name in names:
                self.buffers[name] = shared
                self._offset[name] = _address(args[name]) - _address(whole)

    def address(self, name: str) -> int | None:
        value = self._args[name]
        if value is None or isinstance(value, int):
            return value
        if isinstance(value, Buffer):
            return value.address
        if name not in self.buffers:
            raise ArgumentError(f"{name}: expected a tensor, a Buffer, an address or None")
        return self.buffers[name].address + self._offset[name]

    def copy_back(self) -> None:
        for names in self._homes.values():
            buffer = self.buffers[names[0]]
            if not buffer.writable:
                continue
            target = self._args[names[0]] if len(names) == 1 else _whole(self._args[names[0]])
            if isinstance(target, torch.Tensor):
                with torch.no_grad():
                    target.copy_(buffer.array())
            else:
                target[...] = buffer.array()


def _storage_of(value: Any) -> Any:
    """The tensor behind a descriptor made on the host."""
    return value.base if type(value).__name__ == "TensorDescriptor" else value


def _storage(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().data_ptr()
    return int(value.ctypes.data)


def _address(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else int(value.ctypes.data)


def _whole(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
