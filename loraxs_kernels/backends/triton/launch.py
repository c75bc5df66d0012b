"""From operands to one launch: workspace, arguments, grid, and the compiled kernel.

What follows from shapes, strides, dtypes and alignment alone (plan, grid, specialisation, all
integer arguments) is prepared once and remembered; a repeated call only fills in pointers and the
scaling.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraxs_kernels.backends import flags as flag_store
from loraxs_kernels.backends.problem import described_by, gpu_of, problem_of, software
from loraxs_kernels.backends.roles import Operands, kind_of
from loraxs_kernels.backends.triton import INTERPRET, autotune, two_step
from loraxs_kernels.backends.triton import plan as planning
from loraxs_kernels.backends.triton.describe import block_of, descriptor
from loraxs_kernels.backends.triton.device.sync import FIXED_FLAGS
from loraxs_kernels.backends.triton.device.tiles import SPLIT
from loraxs_kernels.backends.triton.kernels import lora_xs_kernel
from loraxs_kernels.backends.triton.plan import Gpu, Plan, Problem, ceil_div
from loraxs_kernels.backends.triton.specialise import (
    COUNTS,
    SIZES,
    STRIDES,
    Specialisation,
    compile_for,
    descriptor_fact,
    specialise,
)

#: Number of kernels launched by this process.
launches = 0

#: Replaces the choice of a plan: for tests.
plan_override: Callable[[Problem, Gpu], Plan | None] | None = None

_MOST_PREPARED = 4096


@dataclass
class Prepared:
    """What a launch needs besides pointers and numbers."""

    plan: Plan
    grid: int
    spec: Specialisation
    integers: tuple[int, ...]
    flag_count: int
    t_shape: tuple[int, int] | None
    side_shape: tuple[int, int] | None
    spare_shape: tuple[int, int] | None
    partial: int
    blocks: tuple[tuple[int, int] | None, ...]  # of the descriptors of x, w, a
    run: Callable[..., None] | None = None
    tuned: bool = False


_prepared: dict[Any, Prepared] = {}


def precisions(dtype: torch.dtype, gpu: Gpu) -> tuple[str, str]:
    """``(of the large products, of the core)`` as Triton's ``input_precision``.

    AMD's matrix units multiply float32 itself ("ieee"). On NVIDIA's:

    float32 operands use tf32 where PyTorch's own products would. Otherwise each is split into two
    tf32 numbers and three products are summed: float32's accuracy on the matrix units. Triton knows
    that as "tf32x3", its interpreter nothing else; ``tiles.multiply`` does it with less traffic.
    The core is float32 under 16-bit inputs too, and always multiplied that way.
    """
    if gpu.arch == 0:
        return "ieee", "ieee"
    thrice = "tf32x3" if INTERPRET else str(SPLIT.value)
    tf32 = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return ("tf32" if tf32 else thrice), thrice


def split_scaling(s: float) -> tuple[float, float, float]:
    """``(fraction, before, after)`` with ``s = fraction * after`` and ``before * after = 1``.

    ``after`` is a power of two, and 1 unless ``|s| > 1``; see ``device/side.py``.
    """
    if not abs(s) > 1.0 or not math.isfinite(s):
        return s, 1.0, 1.0
    exponent = min(math.frexp(s)[1], 120)
    return s / 2.0**exponent, 2.0**-exponent, 2.0**exponent


def launch(o: Operands) -> None:
    """Run one pass: exactly one kernel (unless tuning found library products to be faster)."""
    key = (*kind_of(o), _column_block(o), torch.backends.cuda.matmul.allow_tf32, plan_override)
    ready = _prepared.get(key)
    if ready is None or (not ready.tuned and autotune.measuring()):
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        ready = _prepared[key] = _first_time(o)
    if ready.run is None:
        two_step.run(o)
        return
    run_prepared(o, ready)


def run_prepared(o: Operands, ready: Prepared) -> None:
    """Launch what was prepared for operands of this kind."""
    global launches
    assert ready.run is not None
    pointers = _pointers(o, ready)
    keep = int(o.dropout_p * 2**32)
    numbers = (*split_scaling(o.scaling), o.scaling, 1.0 / (1.0 - o.dropout_p), keep)
    operands = zip((o.x, o.w, o.a), ready.blocks, strict=True)
    descriptors = [None if t is None or b is None else descriptor(t, b) for t, b in operands]
    ready.run(ready.grid, pointers, descriptors, numbers, ready.integers)
    launches += 1


def _first_time(o: Operands) -> Prepared:
    """Choose a plan for a kind of call, and load its kernel."""
    gpu = gpu_of(o.x.device)
    problem = problem_of(o)
    winner: Plan | str | None = None
    if plan_override is not None:
        return load(o, gpu, plan_override(problem, gpu))
    if not torch.are_deterministic_algorithms_enabled() and not INTERPRET:
        key = autotune.key_of(software(o.x.device), problem, f"{o.x.dtype} {o.core.dtype}")
        winner = autotune.winners().get(key)
        if winner is None and autotune.measuring():
            winner = autotune.race(contenders(o, gpu, problem), autotune.time_on_gpu)
            autotune.remember(key, winner)
    if isinstance(winner, str):
        ready = prepare(o, gpu)
    else:
        ready = load(o, gpu, winner)
    ready.tuned = winner is not None
    return ready


def load(o: Operands, gpu: Gpu, plan: Plan | None) -> Prepared:
    """Prepare a launch (``None``: of the plan that arithmetic chooses) and its kernel."""
    ready = prepare(o, gpu, plan)
    ready.run = _interpreted(ready.spec) if INTERPRET else _loaded(ready.spec, o.x.device)
    return ready


def contenders(o: Operands, gpu: Gpu, problem: Problem) -> dict[Plan | str, Callable[[], None]]:
    """What tuning lets race on the operands of a call."""
    runners: dict[Plan | str, Callable[[], None]] = {autotune.TWO_STEP: lambda: two_step.run(o)}
    for plan in autotune.neighbours(problem, gpu):
        ready = load(o, gpu, plan)
        runners[plan] = functools.partial(run_prepared, o, ready)
    return runners


def _scratch(shape: tuple[int, int] | None, x: Tensor) -> Tensor | None:
    return None if shape is None else torch.empty(shape, dtype=x.dtype, device=x.device)


def _pointers(o: Operands, ready: Prepared) -> list[Tensor | None]:
    """The tensors in the kernel's order, scratch included."""
    x = o.x
    side = _scratch(ready.side_shape, x) if o.side is None else o.side
    partial = None
    if ready.partial:
        partial = torch.empty(ready.partial, dtype=torch.float32, device=x.device)
    counters = flag_store.flags(x.device, ready.flag_count) if ready.flag_count else None
    bad = flag_store.bad_ids(x.device) if o.ids is not None and o.order is None else None
    return [
        x, o.w, o.base, o.a, o.core, o.b, o.bias, o.d, side, _scratch(ready.spare_shape, x),
        _scratch(ready.t_shape, x), o.q, o.dR, partial, o.db, counters, o.seed, o.ids, o.order,
        o.offsets, bad,
    ]  # fmt: skip


def prepare(o: Operands, gpu: Gpu, plan: Plan | None = None) -> Prepared:
    """Everything about a launch that pointers and numbers do not change. Reads no tensor's data."""
    problem = problem_of(o)
    if plan is None:
        plan = planning.choose(problem, gpu)
    M, N, K, rank = problem.M, problem.N, problem.K, problem.rank
    row_blocks, col_tiles = ceil_div(M, plan.BM), ceil_div(N, plan.BN) if problem.has_d else 0
    slices = ceil_div(rank, plan.BR)
    ride, ticket = plan.scheme == planning.RIDE_ALONG, plan.scheme == planning.TICKET
    gemm_items = 0
    if problem.has_d or problem.need_dR:
        per_block = col_tiles if ride else slices + col_tiles if ticket else plan.parts
        gemm_items = row_blocks * per_block
    dr_tiles = problem.adapters * ceil_div(rank, plan.DI) * ceil_div(rank, plan.DJ)
    dr_items = dr_tiles * plan.chunks if problem.need_dR else 0
    db_items = ceil_div(K, plan.DB_N) if problem.need_db else 0
    items = db_items + gemm_items + dr_items
    tickets = problem.need_dR or (ticket and problem.has_d)
    t_cols = ceil_div(rank, plan.CR) * plan.CR
    needs_side = o.side is None and (problem.need_dR or (problem.has_d and not ride))
    side_cols = ceil_div(rank, 16) * 16 if o.side is None else o.side.stride(0)
    extra = plan.parts - 1 if plan.scheme == planning.RESIDENT else 0
    atomic = problem.need_dR and atomic_core_gradient() and o.core.dtype == torch.float32
    chunked = problem.need_dR and plan.chunks > 1 and not atomic
    flag_count = int(FIXED_FLAGS.value) + 2 * row_blocks + (dr_tiles if chunked else 0)
    integers = dict(
        M=M, N=N, K=K, rank=rank, adapters=problem.adapters,
        side_row=side_cols, t_row=t_cols, t_cols=t_cols,
        dropout_columns=N if o.mask_output else K,
        parts=plan.parts, chunks=plan.chunks, db_items=db_items, gemm_items=gemm_items,
        dr_items=dr_items, flag_count=flag_count,
        **_strides(o),
    )  # fmt: skip
    partial = dr_tiles * plan.chunks * plan.DI * plan.DJ if chunked else 0
    has_t = problem.has_d and not ride
    ready = Prepared(
        plan,
        items,
        _no_specialisation,
        tuple(integers[n] for n in SIZES + STRIDES + COUNTS),
        flag_count if tickets else 0,
        ((1 + extra) * M, t_cols) if has_t else None,
        (M, side_cols) if needs_side else None,
        (extra * M, side_cols) if extra else None,
        partial,
        _blocks(o, problem, plan),
    )
    constants = _constants(o, problem, plan, gpu, tickets=tickets, atomic=atomic, ride=ride)
    facts = [descriptor_fact(t, b) for t, b in zip((o.x, o.w, o.a), ready.blocks, strict=True)]
    ready.spec = specialise(
        _placeholders(o, ready), facts, integers, constants, plan.stages, plan.warps
    )
    return ready


def _blocks(
    o: Operands, problem: Problem, plan: Plan
) -> tuple[tuple[int, int] | None, tuple[int, int] | None, tuple[int, int] | None]:
    """The tiles of X, W and A that the plan has the copy engine read. A's rows may be too short."""
    if not plan.tma:
        return None, None, None
    if not problem.descriptors:
        raise RuntimeError("this plan needs X and W in rows that start at multiples of 16 bytes")
    w, a = described_by(o.w), described_by(o.a)
    return (
        (plan.BM, plan.BK),
        block_of(w, plan.BN, plan.BK) if w else None,
        block_of(a, plan.BR, plan.BK) if a else None,
    )


_no_specialisation = Specialisation((), (), 0, 0)


def _placeholders(o: Operands, ready: Prepared) -> list[Tensor | None]:
    """The tensors of :func:`_pointers`; what the allocator will give stands in as meta tensors.

    The allocator aligns to 512 bytes, a meta tensor's address is 0: both are aligned.
    """

    def meta(there: object, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(0, dtype=dtype, device="meta") if there else None

    dtype = o.x.dtype
    side = meta(ready.side_shape, dtype) if o.side is None else o.side
    return [
        o.x, o.w, o.base, o.a, o.core, o.b, o.bias, o.d, side, meta(ready.spare_shape, dtype),
        meta(ready.t_shape, dtype), o.q, o.dR, meta(ready.partial, torch.float32), o.db,
        meta(ready.flag_count, torch.int32), o.seed, o.ids, o.order, o.offsets,
        meta(o.ids is not None and o.order is None, torch.int32),
    ]  # fmt: skip


def _strides(o: Operands) -> dict[str, int]:
    def pair(t: Tensor | None) -> tuple[int, int]:
        return (1, 1) if t is None else (t.stride(0), t.stride(1))

    names = {"x": o.x, "w": o.w, "base": o.base, "a": o.a, "b": o.b}
    strides = {}
    for name, t in names.items():
        strides[f"{name}_row"], strides[f"{name}_col"] = pair(t)
    strides["core_adapter"] = o.core.stride(0) if o.core.dim() == 3 else 0
    strides["core_row"], strides["core_col"] = o.core.stride(-2), o.core.stride(-1)
    strides["q_row"] = 1 if o.q is None else o.q.stride(0)
    return strides


def _constants(
    o: Operands, problem: Problem, plan: Plan, gpu: Gpu, *, tickets: bool, atomic: bool, ride: bool
) -> dict[str, Any]:
    """The compile-time parameters, in the kernel's order."""
    precision, core_precision = precisions(o.x.dtype, gpu)
    widest = max(plan.BR, plan.CR)
    from_plan = (
        "BM", "BN", "BK", "BR", "CM", "CL", "CR", "GROUP_M", "DI", "DJ", "DM", "DB_M", "DB_N"
    )  # fmt: skip
    return {
        "SCHEME": plan.scheme,
        **{name: getattr(plan, name) for name in from_plan},
        "HAS_D": problem.has_d,
        "HAS_W": problem.has_w,
        "HAS_BASE": o.base is not None,
        "HAS_BIAS": o.bias is not None,
        "STORE_SIDE": o.side is not None or problem.need_dR,
        "NEED_DR": problem.need_dR,
        "NEED_DB": problem.need_db,
        "MASK_INPUT": problem.mask_input,
        "MASK_OUTPUT": problem.mask_output,
        "COLUMN_BLOCK": _column_block(o),
        "PER_ROW": problem.per_row,
        "SORTED": problem.per_row and o.order is not None,
        "REPORT_BAD": problem.per_row and o.order is None,
        "ATOMIC": atomic,
        "MANY_PARTS": plan.scheme == planning.RESIDENT and plan.parts > 1,
        "TICKETS": tickets,
        "X_EDGE": _edge(problem.M, plan.BM, masked=plan.BM > problem.M or plan.BM <= 32),
        "W_EDGE": _edge(problem.N, plan.BN, masked=o.w is not None and o.w.stride(0) == 1),
        "B_EDGE": _edge(problem.N, plan.BN, masked=o.b.stride(0) == 1),
        "EVEN_K": problem.K % plan.BK == 0,
        "EVEN_R": problem.rank % widest == 0,
        "X_DESC": described_by(o.x) if plan.tma else 0,
        "W_DESC": described_by(o.w) if plan.tma else 0,
        "A_DESC": described_by(o.a) if plan.tma else 0,
        "PRECISION": precision,
        "CORE_PRECISION": core_precision,
        "STAGES": plan.stages,
    }


def _column_block(o: Operands) -> bool:
    """Whether the dropout mask is a block of columns of a wider one: the seed then says which."""
    return o.dropout_p > 0.0 and o.seed is not None and o.seed.numel() == 3


def _edge(rows: int, block: int, *, masked: bool) -> int:
    """How tiles of ``block`` rows end at the last row, as ``device/tiles.py`` names it."""
    return 0 if rows % block == 0 else 2 if masked else 1


def atomic_core_gradient() -> bool:
    """Whether ``LORAXS_ATOMIC_DR=1`` asks for dR by atomics (float32 R only): no fixed order."""
    asked = os.environ.get("LORAXS_ATOMIC_DR", "0") == "1"
    return asked and not torch.are_deterministic_algorithms_enabled()


def _interpreted(spec: Specialisation) -> Callable[..., None]:
    def run(
        grid: int, pointers: list[Tensor | None], descriptors: Any, numbers: Any, integers: Any
    ) -> None:
        unused = pointers[0]
        tensors = [unused if t is None else t for t in pointers]
        constants = [value for _, value in spec.constants]
        lora_xs_kernel[(grid,)](*tensors, *descriptors, *numbers, *integers, *constants)

    return run


def _loaded(spec: Specialisation, device: torch.device) -> Callable[..., None]:
    """The launcher of a compiled kernel, past Triton's own dispatch (which costs more than all of
    this module): the facts it would look up on every call are the key of :data:`_prepared`."""
    from triton import knobs
    from triton.runtime import driver

    index = device.index if device.index is not None else torch.cuda.current_device()
    constants = tuple(value for _, value in spec.constants)
    with torch.cuda.device(index):
        target = driver.active.get_current_target()
        kernel = compile_for(spec, target.backend, target.arch, target.warp_size, index)
        launch_kernel = kernel.run

    def run(
        grid: int, pointers: list[Tensor | None], descriptors: Any, numbers: Any, integers: Any
    ) -> None:
        addresses = [0 if t is None else t.data_ptr() for t in pointers]
        stream = torch._C._cuda_getCurrentRawStream(index)
        arguments = (*addresses, *descriptors, *numbers, *integers, *constants)
        hooks = knobs.runtime
        metadata = kernel.launch_metadata((grid, 1, 1), stream, *arguments)
        if torch._C._cuda_getDevice() != index:
            with torch.cuda.device(index):
                return run(grid, pointers, descriptors, numbers, integers)
        launch_kernel(
            grid, 1, 1, stream, kernel.function, kernel.packed_metadata, metadata,
            hooks.launch_enter_hook, hooks.launch_exit_hook, *arguments,
        )  # fmt: skip

    return run
