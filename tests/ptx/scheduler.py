"""A launch: argument packing, resident CTAs, their order, and deadlock."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptx.clocks import Releases
from tests.ptx.cluster import LARGEST, Cluster
from tests.ptx.counters import Report
from tests.ptx.errors import ArgumentError, Deadlock
from tests.ptx.machine import Cta, Program
from tests.ptx.memory import Buffer, Memory
from tests.ptx.numeric import DTYPES, f32_to_bf16, size_of
from tests.ptx.parser import Kernel, Param
from tests.ptx.shared import BASE as SHARED_BASE

SPIN_LIMIT = 2000  # loop iterations of a CTA in which nothing changes anywhere


class Grid:
    """What the CTAs of one launch have in common."""

    def __init__(
        self, kernel: Kernel, shape: tuple[int, int, int], block: tuple[int, int, int],
        memory: Memory, dynamic_bytes: int, cluster: int,
    ):  # fmt: skip
        if not 1 <= cluster <= LARGEST or shape[0] % cluster:
            raise ArgumentError(f"clusters of {cluster} CTAs in a grid of {shape}")
        self.kernel = kernel
        self.shape = shape
        self.block = block
        self.memory = memory
        self.dynamic_bytes: int = dynamic_bytes
        self.cluster: int = cluster  # CTAs of a cluster, neighbours in x
        self.ctas = shape[0] * shape[1] * shape[2]
        self.report = Report(ctas=self.ctas)
        self.releases = Releases()
        wanted = block[0] * block[1] * block[2]
        threads = -(-wanted // 32) * 32
        linear = np.arange(threads)
        self.real_threads = linear < wanted
        self.thread_index = (
            linear % block[0], linear // block[0] % block[1], linear // (block[0] * block[1]),
        )  # fmt: skip
        self.shared_bytes: int
        self.symbols, self.shared_bytes = self._lay_out_shared()
        self.local_bytes = 0
        for v in kernel.local:
            start = -(-self.local_bytes // v.align) * v.align
            self.symbols[v.name] = start
            self.local_bytes = -(-(start + (v.size or 0)) // 16) * 16
        self.threads = threads

    def _lay_out_shared(self) -> tuple[dict[str, int], int]:
        symbols, end = {}, 0
        for v in self.kernel.shared:
            if v.size is not None:
                start = -(-end // v.align) * v.align
                symbols[v.name] = SHARED_BASE + start
                end = start + v.size
        dynamic = [v for v in self.kernel.shared if v.size is None]
        if dynamic:
            end = -(-end // max(16, *(v.align for v in dynamic))) * max(
                16, *(v.align for v in dynamic)
            )
            symbols.update({v.name: SHARED_BASE + end for v in dynamic})
        return symbols, end + self.dynamic_bytes


def launch(
    kernel: Kernel,
    *,
    grid: Sequence[int],
    args: Sequence[Any],
    memory: Memory,
    threads: int | Sequence[int] | None = None,
    shared_bytes: int = 0,
    residency: int | None = None,
    order: str | random.Random = "linear",
    spin_limit: int = SPIN_LIMIT,
    cluster: int = 1,
) -> Report:
    """Run ``kernel`` on ``grid`` CTAs and count what it does.

    ``args``: a ``Buffer`` (its address), numbers, or bytes for by-value structures, one per
    parameter. ``threads``: of a CTA, one number or up to three; default: what the kernel requires.
    ``shared_bytes``: the dynamic shared memory. ``residency``: how many CTAs are resident at once
    (None: all). ``order``: in which CTAs start and take turns: "linear", "reversed", or a
    ``random.Random`` that draws both. ``spin_limit``: loop iterations without any change of global
    memory after which a CTA counts as spinning; when all resident CTAs spin or wait, ``Deadlock``.
    ``cluster``: how many CTAs, neighbours in x, are a cluster; they become resident together, so
    ``residency`` counts whole clusters' CTAs.
    """
    shape, block = _three(grid), _three(threads or kernel.reqntid or (128,))
    if kernel.reqntid and block != kernel.reqntid:
        raise ArgumentError(f"{kernel.name} requires {kernel.reqntid} threads, got {block}")
    common = Grid(kernel, shape, block, memory, shared_bytes, cluster)
    residency = residency or common.ctas
    if residency < cluster:
        raise ArgumentError(f"residency {residency}: a cluster of {cluster} CTAs never starts")
    program = Program(
        kernel, common.threads, _symbols(kernel, common), _parameters(kernel, args, memory)
    )
    memory.begin_launch()
    with np.errstate(all="ignore"):
        _run(common, program, residency, order, spin_limit)
    return common.report


def _three(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    found = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    x, y, z = (*found, 1, 1)[:3]
    return int(x), int(y), int(z)


def _symbols(kernel: Kernel, grid: Grid) -> dict[str, int]:
    """Addresses of all variables; those of the module are made on first use of the memory."""
    symbols = dict(grid.symbols)
    for v in kernel.module.globals:
        key = (id(kernel.module), v.name)
        if key not in grid.memory.symbols:
            data = np.frombuffer(v.data.ljust(v.size or 0, b"\0"), np.uint8)
            grid.memory.symbols[key] = grid.memory.buffer(data, v.name)
        symbols[v.name] = grid.memory.symbols[key].address
    return symbols


def _parameters(kernel: Kernel, args: Sequence[Any], memory: Memory) -> int:
    """Pack the arguments into a read-only buffer; its address."""
    if len(args) != len(kernel.params):
        kinds = ", ".join(p.kind for p in kernel.params)
        raise ArgumentError(
            f"{kernel.name} takes {len(kernel.params)} arguments ({kinds}), got {len(args)}"
        )
    raw = bytearray(max(1, kernel.param_bytes))
    for param, arg in zip(kernel.params, args, strict=True):
        packed = _pack(param, arg)
        raw[param.offset : param.offset + len(packed)] = packed
    data = np.frombuffer(bytes(raw), np.uint8)
    return memory.buffer(data, f"parameters of {kernel.name}", writable=False).address


def _pack(param: Param, arg: Any) -> bytes:
    if isinstance(arg, Buffer):
        arg = arg.address
    if isinstance(arg, bytes | bytearray):
        if len(arg) != param.size:
            raise ArgumentError(f"{param.name} has {param.size} bytes, got {len(arg)}")
        return bytes(arg)
    if param.size != size_of(param.kind):
        raise ArgumentError(f"{param.name} is a structure of {param.size} bytes, got {arg!r}")
    dtype = np.dtype(DTYPES[param.kind])
    if param.kind == "bf16":
        return f32_to_bf16(np.array([arg], np.float32)).tobytes()
    if dtype.kind == "f":
        return np.array(float(arg), dtype).tobytes()
    value = int(arg)
    if value != arg or not -(1 << param.size * 8 - 1) <= value < 1 << param.size * 8:
        raise ArgumentError(f"{param.name} is a {param.kind}, got {arg!r}")
    return (value & (1 << param.size * 8) - 1).to_bytes(param.size, "little")


def _run(
    grid: Grid, program: Program, residency: int, order: str | random.Random, spin_limit: int
) -> None:
    waiting = list(range(0, grid.ctas, grid.cluster))  # the first CTA of each cluster
    if isinstance(order, random.Random):
        order.shuffle(waiting)
    elif order == "reversed":
        waiting.reverse()
    elif order != "linear":
        raise ArgumentError(f"order {order!r}: expected linear, reversed or a random.Random")
    waiting.reverse()  # taken from the end
    resident: list[Cta] = []
    turn = 0
    changes = grid.memory.changes
    while waiting or resident:
        while waiting and len(resident) + grid.cluster <= residency:
            resident += _start(grid, program, waiting.pop(), order)
        turn = (
            order.randrange(len(resident))
            if isinstance(order, random.Random)
            else turn % len(resident)
        )
        cta = resident[turn]
        worked = cta.run()
        if cta.done:
            cta.cluster.leave(cta)
            resident.remove(cta)
            _account(grid, program, cta)
        if cta.done or grid.memory.changes != changes:
            changes = grid.memory.changes
            for other in resident:
                other.spins = 0
                other.stuck = False
        else:
            cta.stuck = not worked
            if all(other.stuck or other.spins > spin_limit for other in resident):
                _deadlock(resident, residency, waiting)
        if not cta.done:
            turn += 1


def _start(grid: Grid, program: Program, first: int, order: str | random.Random) -> list[Cta]:
    """The CTAs of a cluster, in the order in which they take turns."""
    x, y, _ = grid.shape
    cluster = Cluster()
    ctas = [
        Cta(grid, program, (n % x, n // x % y, n // (x * y)), n, cluster)
        for n in range(first, first + grid.cluster)
    ]
    if isinstance(order, random.Random):
        order.shuffle(ctas)
    return ctas[::-1] if order == "reversed" else ctas


def _deadlock(resident: list[Cta], residency: int, waiting: list[int]) -> None:
    for cta in resident:
        cta.raise_if_divergent()
    places = "\n  ".join(cta.blocked_at() for cta in resident[:8])
    raise Deadlock(
        f"{len(resident)} resident CTAs (residency {residency}), {len(waiting)} clusters not "
        f"started, none makes progress:\n  {places}"
    )


def _account(grid: Grid, program: Program, cta: Cta) -> None:
    by_line: Counter[int] = Counter()
    for instruction, count in zip(program.code, cta.counts, strict=True):
        if count:
            grid.report.instructions[instruction.opcode] += count
            by_line[instruction.line] += count
    grid.report.instructions_by_line.update(by_line)
