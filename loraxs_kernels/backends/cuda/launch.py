"""From operands to one launch of a kernel of ``csrc/cuda``.

What follows from shapes, strides, dtypes and alignment alone (plan, number of flags) is prepared
once and remembered; a repeated call only passes the tensors on. The C++ side checks all of them
again, allocates scratch and launches.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loraxs_kernels import _native
from loraxs_kernels.backends import flags as flag_store
from loraxs_kernels.backends.cuda import plan as planning
from loraxs_kernels.backends.cuda.plan import Plan
from loraxs_kernels.backends.problem import gpu_of, problem_of, reads_vectors, software
from loraxs_kernels.backends.roles import Operands, kind_of, rows
from loraxs_kernels.backends.triton import autotune
from loraxs_kernels.backends.triton.plan import Gpu, Problem

#: Number of kernels launched by this process.
launches = 0

#: Replaces the choice of a plan: for tests.
plan_override: Callable[[Problem, Gpu], Plan | None] | None = None

_MOST_PREPARED = 4096


@dataclass
class Prepared:
    """What a launch needs besides the tensors. ``reports``: whether it may meet a bad id."""

    plan: Plan
    numbers: tuple[int, int, int, int]  # the kernel's index, chunks, parts, group
    flag_count: int
    reports: bool
    tuned: bool = False


_prepared: dict[Any, Prepared] = {}


def operator() -> Any:
    """``torch.ops.loraxs_cuda.run``."""
    return _native.operators("cuda").run.default  # type: ignore[union-attr]


def launch(o: Operands) -> None:
    """Run one pass: exactly one kernel.

    Raises:
        RuntimeError: no kernel takes the operands.
    """
    key = (*kind_of(o), plan_override)
    ready = _prepared.get(key)
    if ready is None or (not ready.tuned and autotune.measuring()):
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        ready = _prepared[key] = _first_time(o)
    run(o, ready)


def direction_of(o: Operands) -> str:
    """Which layouts W, A and B' have: a backward's are the forward's, transposed."""
    return "backward" if o.mask_output else "forward"


def all_vectors(o: Operands) -> bool:
    """Whether every matrix has lines of whole 16 bytes."""
    return reads_vectors(o.x, o.w, o.base, o.a, o.b, o.d, o.side, o.q)


def candidates(o: Operands, problem: Problem, gpu: Gpu) -> list[Plan]:
    """The plans that can run ``o``, cheapest first."""
    if o.x.dtype not in (torch.bfloat16, torch.float16):
        return []
    element = str(o.x.dtype).removeprefix("torch.")
    return planning.candidates(
        problem, element, direction_of(o), gpu, planning.kernels(), vectors=all_vectors(o)
    )


def contenders(o: Operands, problem: Problem, gpu: Gpu) -> dict[Plan, Callable[[], None]]:
    """What tuning lets race: every kernel's plan, and other groups and parts of the cheapest."""
    plans = candidates(o, problem, gpu)
    if plans:
        best = plans[0]
        plans += [replace(best, group=group) for group in (4, 16)]
        if best.parts > 1:
            plans += [replace(best, parts=n) for n in (best.parts // 2, best.parts * 2) if n]
    return {plan: functools.partial(run, o, prepare(o, plan)) for plan in dict.fromkeys(plans)}


def _first_time(o: Operands) -> Prepared:
    """Choose a plan for a kind of call."""
    gpu, problem = gpu_of(o.x.device), problem_of(o)
    if plan_override is not None:
        plan = plan_override(problem, gpu)
        if plan is not None:
            return prepare(o, plan)
    plans = candidates(o, problem, gpu)
    if not plans:
        raise RuntimeError(
            f"backend 'cuda': no kernel of the library takes {problem}; use another backend"
        )
    winner: Any = None
    if torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled():
        key = "cuda | " + autotune.key_of(
            software(o.x.device), problem, f"{o.x.dtype} {o.core.dtype}"
        )
        winner = autotune.winners().get(key)
        if winner is None and autotune.measuring():
            winner = autotune.race(contenders(o, problem, gpu), autotune.time_on_gpu)
            autotune.remember(key, winner)
    ready = prepare(o, winner if isinstance(winner, Plan) else plans[0])
    ready.tuned = winner is not None
    return ready


def prepare(o: Operands, plan: Plan) -> Prepared:
    """Everything about a launch that the tensors' addresses do not change.

    Raises:
        RuntimeError: the plan's kernel cannot take these sizes.
    """
    _, table = planning.kernels()
    kernel = next((k for k in table if k.name == plan.kernel), None)
    if kernel is None:
        raise RuntimeError(f"backend 'cuda': this build has no kernel {plan.kernel}")
    M, K = o.x.shape
    adapters = o.core.shape[0] if o.core.dim() == 3 else 1
    has = [t is not None for t in (o.d, o.w, o.side, o.dR, o.db, o.ids)]
    counts = json.loads(
        torch.ops.loraxs_cuda.geometry(
            kernel.index, M, o.b.shape[0], K, o.a.shape[0], adapters, *has,
            plan.chunks, plan.parts, plan.group,
        )
    )  # fmt: skip
    reports = o.ids is not None and o.order is None
    numbers = (kernel.index, plan.chunks, plan.parts, plan.group)
    return Prepared(plan, numbers, counts["flag_count"], reports)


def run(o: Operands, ready: Prepared) -> None:
    """Launch what was prepared for operands of this kind."""
    global launches
    device = o.x.device
    flags: Tensor | None = None
    if ready.flag_count:
        flags = flag_store.flags(device, ready.flag_count)
    bad = flag_store.bad_ids(device) if ready.reports else None
    base = None if o.base is None else rows(o.base)
    bias = None if o.bias is None else o.bias.to(o.x.dtype).contiguous()
    operator()(
        o.x, o.w, base, o.a, o.core, o.b, bias, o.q, o.ids, o.order, o.offsets, o.d, o.side, o.dR,
        o.db, flags, bad, o.scaling, *ready.numbers,
    )  # fmt: skip
    launches += 1
