"""Small hand-written kernels for the interpreter's own tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptx.counters import Report
from tests.ptx.memory import Memory
from tests.ptx.numeric import UNSIGNED, Array
from tests.ptx.parser import Module
from tests.ptx.scheduler import launch

HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<32>;
    .reg .b16 %h<64>;
    .reg .b32 %r<256>;
    .reg .f32 %f<256>;
    .reg .b64 %d<64>;
    .reg .f64 %g<64>;
"""
PREFIX = {2: "%h", 4: "%r", 8: "%d"}


def kernel_text(body: str, params: int = 2, shared: int = 0) -> str:
    """A kernel ``k`` with 64-bit parameters p0, p1, ... and ``shared`` bytes named smem."""
    names = ", ".join(f".param .u64 p{n}" for n in range(params))
    smem = f".shared .align 1024 .b8 smem[{shared}];" if shared else ""
    return f"{HEADER}.visible .entry k({names})\n{{{REGISTERS}\n{smem}\n{body}\nret;\n}}\n"


def run(
    body: str, arrays: Sequence[Any] = (), *, threads: int = 32, grid: int = 1, shared: int = 0,
    residency: int | None = None, order: str | random.Random = "linear",
    readonly: Sequence[int] = (),
) -> tuple[list[Any], Report]:  # fmt: skip
    """Run a body whose parameters p0, p1, ... point to the arrays; the arrays after, counters."""
    memory = Memory(1 << 24)
    buffers = [memory.buffer(a, f"p{n}", n not in readonly) for n, a in enumerate(arrays)]
    kernel = Module(kernel_text(body, len(arrays), shared)).kernels["k"]
    report = launch(
        kernel, grid=(grid,), args=buffers, memory=memory, threads=threads,
        residency=residency, order=order,
    )  # fmt: skip
    return [b.array() for b in buffers], report


def per_thread(code: str, inputs: Sequence[Array], out: Any) -> Array:
    """Run ``code`` once per element: thread t finds ``inputs[n][t]`` in register ``a<n>`` (a name
    that is replaced by a register of its width) and leaves the result of dtype ``out`` in ``out``.
    """
    threads = len(inputs[0])
    padded = -(-threads // 32) * 32
    arrays = [np.concatenate([a, np.repeat(a[-1:], padded - threads)]) for a in inputs]
    dtype = np.dtype(out)
    lines = ["mov.u32 %r250, %tid.x;"]
    for n, array in enumerate(arrays):
        size = array.dtype.itemsize
        lines += [
            f"ld.param.u64 %d60, [p{n}]; mad.wide.u32 %d60, %r250, {size}, %d60;",
            f"ld.global.b{8 * size} {PREFIX[size]}{50 + n}, [%d60];",
        ]
        code = code.replace(f"a{n}", f"{PREFIX[size]}{50 + n}")
    target = f"{PREFIX[dtype.itemsize]}40"
    lines += [
        code.replace("out", target),
        f"ld.param.u64 %d60, [p{len(arrays)}];",
        f"mad.wide.u32 %d60, %r250, {dtype.itemsize}, %d60;",
        f"st.global.b{8 * dtype.itemsize} [%d60], {target};",
    ]
    result = np.zeros(padded, UNSIGNED[dtype.itemsize])
    after, _ = run("\n".join(lines), [*arrays, result], threads=padded)
    return after[-1].view(dtype)[:threads]
