"""The Triton backend on a GPU that is not there: its launches are executed from the compiled PTX.

Everything but the driver is the real thing: the backend's passes, the launcher's arguments, facts
and workspace, the kernel compiled for the architecture. Each launch leaves its counters, beside
what the formulas of ``kernels.py`` and ``device/`` say it should cost.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loraxs_kernels.backends import triton as backend
from loraxs_kernels.backends.triton import launch
from loraxs_kernels.backends.triton.device import tiles
from loraxs_kernels.backends.triton.plan import RESIDENT, RIDE_ALONG, TICKET, Plan, ceil_div
from loraxs_kernels.backends.triton.specialise import (
    COUNTS,
    DESCRIPTORS,
    NUMBERS,
    POINTERS,
    SIZES,
    STRIDES,
    Specialisation,
    compile_for,
)
from tests.ptx.counters import SECTOR
from tests.ptx.triton_kernel import Compiled, Run, from_triton, run_kernel

SCHEMES = {"ride-along": RIDE_ALONG, "resident": RESIDENT, "ticket": TICKET}

#: What a pass must never write.
READONLY = (
    "x_ptr", "w_ptr", "base_ptr", "a_ptr", "core_ptr", "b_ptr", "bias_ptr", "q_ptr", "seed_ptr",
    "ids_ptr", "order_ptr", "offsets_ptr",
)  # fmt: skip

_MASKED = 2  # of device/tiles.py


def small_plan(scheme: str, rank: int = 16, **changes: Any) -> Plan:
    """Tiles that wgmma can still take, and no larger: 64 rows, 4 warps."""
    padded = max(16, 1 << (rank - 1).bit_length())
    step = min(padded, 64)
    sizes: dict[str, Any] = {
        "BM": 64, "BN": 64, "BK": 32, "BR": padded if scheme == "ride-along" else step,
        "CM": 64, "CL": min(step, 32), "CR": max(step, padded) if scheme == "ride-along" else step,
        "DI": min(padded, 32), "DJ": step, "stages": 2, "warps": 4,
        "GROUP_M": 2, "parts": 1, "DM": 32, "chunks": 2, "DB_M": 32, "DB_N": 64,
    }  # fmt: skip
    sizes.update(changes)
    return Plan(scheme=SCHEMES[scheme], **sizes)


@contextmanager
def allowed_tf32(allowed: bool = True) -> Iterator[None]:
    """PyTorch's switch for products of float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@dataclass
class Executed:
    """One launch. ``facts``: the kernel's compile-time parameters and integers, by name."""

    facts: dict[str, Any]
    pointers: dict[str, Tensor | None]
    compiled: Compiled
    run: Run

    def k_loops(self) -> list[set[int]]:
        """The PTX lines of each loop along K: the innermost loops with matrix instructions that
        hold lines of ``tiles.accumulate``, by the compiler's own line information.
        """
        return [loop for loop in self.matrix_loops() if self._accumulates(loop)]

    def matrix_loops(self) -> list[set[int]]:
        """The innermost loops that executed matrix instructions, of any product."""
        flops = self.run.report.tensor_flops_by_line
        return [loop for loop in self.compiled.kernel.main_loops() if any(flops[n] for n in loop)]

    def _accumulates(self, loop: set[int]) -> bool:
        text = self.compiled.asm["ptx"]
        files = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]*)"', text, re.M))
        source, first = inspect.getsourcelines(tiles.accumulate.fn)
        current = False
        for n, line in enumerate(text.splitlines(), 1):
            place = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
            if place:
                inside = first <= int(place[2]) < first + len(source)
                current = inside and files.get(place[1], "").endswith("tiles.py")
            if current and n in loop:
                return True
        return False

    def moved(self) -> int:
        """Global bytes loaded and stored. What several threads of a warp share moves once."""
        return sum(
            min(entry.load_bytes, SECTOR * entry.load_sectors)
            + min(entry.store_bytes, SECTOR * entry.store_sectors)
            for entry in self.run.report.lines.values()
        )

    def worst_conflict(self) -> float:
        """Wavefronts over those needed, of the worst load from shared memory in the K loops."""
        report, lines = self.run.report, self.compiled.asm["ptx"].splitlines()
        worst = 1.0
        for n in set().union(*self.k_loops()):
            taken, excess = report.shared_wavefronts[n], report.bank_conflicts[n]
            if excess and re.search(r"ld(matrix|\.shared)", lines[n - 1]):
                worst = max(worst, taken / (taken - excess))
        return worst

    def conflicts(self) -> int:
        """Wavefronts beyond those needed, of all loads from shared memory in the K loops."""
        report, lines = self.run.report, self.compiled.asm["ptx"].splitlines()
        return sum(
            report.bank_conflicts[n]
            for n in set().union(*self.k_loops())
            if re.search(r"ld(matrix|\.shared)", lines[n - 1])
        )

    def wide_bytes(self) -> int:
        """Bytes loaded from global memory by ``cp.async`` of 16 bytes."""
        entries = self.run.report.lines.values()
        return sum(
            entry.load_bytes
            for entry in entries
            if "cp.async" in entry.text and set(entry.widths) <= {16, 0}
        )

    def global_widths(self, *, loops: bool) -> dict[str, set[int]]:
        """Bytes per thread of the loads from global memory by kind of instruction."""
        lines = set().union(*self.k_loops()) if loops else None
        found: dict[str, set[int]] = {}
        for n, entry in self.run.report.lines.items():
            if entry.load_bytes and (lines is None or n in lines):
                kind = "cp.async" if "cp.async" in entry.text else "ld"
                found.setdefault(kind, set()).update(entry.widths)
        return found


@dataclass
class Device:
    """Executes what the launcher launches, and keeps it."""

    arch: int = 80
    order: Any = "linear"
    residency: int | None = None
    runs: list[Executed] = field(default_factory=list)

    def load(self, spec: Specialisation, device: torch.device) -> Callable[..., None]:
        """Takes the place of ``launch._loaded``."""
        assert device.type == "cpu"
        compiled = _compiled(spec, self.arch)

        def run(
            grid: int, pointers: list[Tensor | None], descriptors: Any, numbers: Any, integers: Any
        ) -> None:
            names = SIZES + STRIDES + COUNTS
            args = dict(zip(POINTERS, pointers, strict=True))
            args |= dict(zip(DESCRIPTORS, descriptors, strict=True))
            args |= dict(zip(NUMBERS, numbers, strict=True))
            args |= dict(zip(names, integers, strict=True))
            done = run_kernel(
                compiled, (grid,), args, readonly=READONLY,
                residency=self.residency, order=self.order,
            )  # fmt: skip
            facts = {**dict(spec.constants), **dict(zip(names, integers, strict=True))}
            tensors = dict(zip(POINTERS, pointers, strict=True))
            self.runs.append(Executed(facts, tensors, compiled, done))

        return run


_cache: dict[tuple[Specialisation, int], Compiled] = {}


def _compiled(spec: Specialisation, arch: int) -> Compiled:
    key = spec, arch
    if key not in _cache:
        _cache[key] = from_triton(compile_for(spec, "cuda", arch, 32))
    return _cache[key]


# ---------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Cost:
    """``needed``: tensor FLOPs if nothing were computed twice, in whole tiles. ``redundant``: what
    the scheme computes again, by design. ``moved``: bytes, every operand once per tile;
    ``streamed``: those of X and W in the K loops.
    """

    needed: int
    redundant: int
    moved: int
    streamed: int


def _whole(n: int, block: int) -> int:
    return ceil_div(n, block) * block


def cost(e: Executed) -> Cost:
    """The cost formulas of the kernel's docstrings, added up for one launch.

    FLOPs, with every size rounded up to its tile, p = 3 for tf32x3, c = 3 for a float32 core and
    d = 3 for float32 operands, which dR always multiplies three times:

        p 2 M N K  +  p 2 M K r  +  c 2 M r^2  +  p 2 M N r  +  (dR)  d 2 M r^2

    and again, in ride-along, (N / BN - 1) (p 2 M K r + c 2 M r^2); in resident parts - 1 times.
    A tile too small for one instruction (16 x 8) per warp is computed by several warps: a core or a
    dR of small rank, and with few rows Q and the tiles of the output.
    """
    f, t = e.facts, e.pointers
    core_type, x_type = _tensor(t, "core_ptr").dtype, _tensor(t, "x_ptr").dtype
    d = 3 if x_type == torch.float32 else 1
    p = 1 if f["PRECISION"] == "tf32" else d
    c = 3 if core_type == torch.float32 else 1
    ride = f["SCHEME"] == RIDE_ALONG
    M, N, K = _whole(f["M"], f["BM"]), _whole(f["N"], f["BN"]), _whole(f["K"], f["BK"])
    rank = _whole(f["rank"], f["BR"])
    tiles = N // f["BN"] if f["HAS_D"] else 0
    main = p * 2 * M * N * K if f["HAS_D"] and f["HAS_W"] else 0
    shrink = p * 2 * M * K * rank
    if ride:
        core, expand = c * 2 * M * rank**2, p * 2 * M * N * rank
    else:
        core = c * 2 * _core_rows(e) * _whole(f["t_cols"], f["CL"]) * _whole(f["rank"], f["CL"])
        core_again = core * (_alike(e, f["CM"], f["CL"], c) - 1)
        expand = p * 2 * M * N * _whole(f["rank"], f["CR"])
    if ride:
        core_again = core * (_alike(e, f["BM"], f["BR"], c) - 1)
    if not f["HAS_D"]:
        core = expand = core_again = 0
    shrink_again = shrink * (_alike(e, f["BM"], f["BR"], p) - 1)
    tile_again = (main + expand) * (_alike(e, f["BM"], f["BN"], p) - 1)
    again = tiles - 1 if ride else f["parts"] - 1 if f["SCHEME"] == RESIDENT else 0
    dR = d * 2 * _dR_rows(e) * _whole(f["rank"], f["DI"]) * _whole(f["rank"], f["DJ"])
    redundant = again * (shrink + shrink_again + core + core_again)
    redundant += shrink_again + core_again + tile_again
    redundant += dR * (_alike(e, f["DI"], f["DJ"], d) - 1)
    needed = main + shrink + core + expand + dR
    return Cost(needed, redundant, _moved(e, again), _streamed(e, again))


def _alike(e: Executed, rows: int, columns: int, products: int) -> int:
    """How many warps compute the same part of a product.

    The compiler lays the warps over both dimensions, or all over the longer one if products follow
    each other on one accumulator (tf32x3).
    """
    down, across = ceil_div(rows, 16), ceil_div(columns, 8)
    if products > 1:
        down, across = (down, 1) if rows >= columns else (1, across)
    return max(1, e.compiled.num_warps // (down * across))


def _tensor(pointers: dict[str, Tensor | None], name: str) -> Tensor:
    found = pointers[name]
    assert found is not None
    return found


def _core_rows(e: Executed) -> int:
    """Rows that the core is applied to, each group of CM as often as it has distinct adapters."""
    f = e.facts
    ids = e.pointers["ids_ptr"]
    if ids is None:
        return _whole(f["M"], f["BM"])
    valid = [set(g.tolist()) for g in ids.split(f["CM"])]
    return f["CM"] * sum(len({a for a in g if 0 <= a < f["adapters"]}) for g in valid)


def _segments(e: Executed) -> list[int]:
    """The rows of P and Q that each adapter's dR reads."""
    f, offsets = e.facts, e.pointers["offsets_ptr"]
    if not f["PER_ROW"]:
        return [f["M"]]
    if offsets is None:
        return [f["M"]] * f["adapters"]
    return offsets.diff()[1:].tolist()


def _dR_rows(e: Executed) -> int:
    f = e.facts
    if not f["NEED_DR"]:
        return 0
    total = 0
    for rows in _segments(e):
        step = _whole(ceil_div(rows, f["chunks"]), f["DM"]) if rows else 0
        for begin in range(0, rows, step or 1):
            total += _whole(min(step, rows - begin), f["DM"])
    return total


def _read(n: int, block: int, edge: int) -> int:
    """Rows read by one pass over all blocks: a clamped edge reads its last row again."""
    return n if edge == _MASKED else _whole(n, block)


def _streamed(e: Executed, again: int) -> int:
    """X and W: once per tile, and X once more for each slice of Q computed apart from a tile."""
    f, size = e.facts, _tensor(e.pointers, "x_ptr").element_size()
    blocks = ceil_div(f["M"], f["BM"])
    tiles = ceil_div(f["N"], f["BN"]) if f["HAS_D"] else 0
    # A descriptor's copy leaves out what lies outside.
    X = f["M"] if f["X_DESC"] else _read(f["M"], f["BM"], f["X_EDGE"])
    W = f["N"] if f["W_DESC"] else _read(f["N"], f["BN"], f["W_EDGE"])
    ride = f["SCHEME"] == RIDE_ALONG
    passes = 0 if ride else (again + 1) * ceil_div(f["rank"], f["BR"])
    passes += tiles if ride or f["HAS_W"] else 0
    return (passes * X + (blocks * W if f["HAS_W"] and f["HAS_D"] else 0)) * f["K"] * size


def _moved(e: Executed, again: int) -> int:
    f, t = e.facts, e.pointers
    size = {name: 0 if v is None else v.element_size() for name, v in t.items()}
    e_x, ride = size["x_ptr"], f["SCHEME"] == RIDE_ALONG
    M, N, K, rank = f["M"], f["N"], f["K"], f["rank"]
    blocks = ceil_div(M, f["BM"])
    tiles = ceil_div(N, f["BN"]) if f["HAS_D"] else 0
    X, B = _read(M, f["BM"], f["X_EDGE"]), _read(N, f["BN"], f["B_EDGE"])
    total = _streamed(e, again)
    if f["HAS_D"]:
        total += M * N * e_x + blocks * B * rank * e_x
        total += blocks * N * size["bias_ptr"] + M * N * size["base_ptr"]
    Q = M * rank * e_x
    if ride:
        total += blocks * tiles * (rank * K * e_x + rank**2 * size["core_ptr"])
        total += Q if f["STORE_SIDE"] else 0
    else:
        one = blocks * rank * K * e_x + Q + M * size["ids_ptr"]
        if f["HAS_D"]:
            groups, steps = _core_rows(e) // f["CM"], ceil_div(f["t_cols"], f["CL"])
            one += steps * Q + groups * rank**2 * size["core_ptr"] + M * f["t_cols"] * e_x
            total += tiles * X * _whole(rank, f["CR"]) * e_x
        total += (again + 1) * one
    return total + _moved_by_gradients(e)


def _moved_by_gradients(e: Executed) -> int:
    f, t = e.facts, e.pointers
    total = 0
    if f["NEED_DR"]:
        dR = _tensor(t, "dr_ptr")
        tiles_i, tiles_j = ceil_div(f["rank"], f["DI"]), ceil_div(f["rank"], f["DJ"])
        rows = sum(_segments(e))
        total += rows * f["rank"] * (tiles_i + tiles_j) * _tensor(t, "x_ptr").element_size()
        if f["PER_ROW"]:  # the order, or the ids: scanned, then read again for the rows of a step
            total += rows * tiles_i * tiles_j * 8 * (1 if f["SORTED"] else 2)
        total += dR.numel() * dR.element_size()
        if f["chunks"] > 1 and not f["ATOMIC"]:
            total += 2 * 4 * f["adapters"] * tiles_i * tiles_j * f["chunks"] * f["DI"] * f["DJ"]
    if f["NEED_DB"]:
        x, db = _tensor(t, "x_ptr"), _tensor(t, "db_ptr")
        total += x.numel() * x.element_size() + db.numel() * db.element_size()
    return total


def install(monkeypatch: Any, device: Device) -> Device:
    """The launcher launches on ``device``; fresh memory holds NaN."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(t: Tensor) -> Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() and t.device.type == "cpu" else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(launch, "plan_override", None)
    monkeypatch.setattr(launch, "_loaded", device.load)
    monkeypatch.setattr(launch, "_prepared", {})
    return device


def execute_small(plan: Plan, arch: int, rank: int, *, backward: bool) -> Executed:
    """One pass of a small layer, in bfloat16 with a float32 R, with the tiles of ``plan``: one row
    block, two column tiles, four steps along K.
    """
    rows, columns, depth = plan.BM, 2 * plan.BN, 4 * plan.BK
    k, n = (columns, depth) if backward else (depth, columns)
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16()

    x, W, A, B, G = draw(rows, k), draw(n, k), draw(rank, k), draw(n, rank), draw(rows, n)
    R, q = torch.randn(rank, rank, generator=g), draw(rows, rank)
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, Device(arch))
        small = replace(plan, parts=1, chunks=1)
        patch.setattr(launch, "plan_override", lambda problem, gpu: small)
        if backward:
            backend.backward(
                G, q, W, A, R, B, None, None, None, None, 0.7, 0.0, True, True, False, 0
            )  # fmt: skip
        else:
            backend.forward(x, W, None, A, R, B, None, None, None, None, None, 0.7, 0.0, 0)
    return device.runs[0]
