"""Which of the two GPU backends launches a pass of a call that names none.

Where both can run it, arithmetic decides: the plan that costs the busiest SM less, in the unit of
both ``plan.py``. On request (``autotune.py``) all plans of both, and library products, are measured
on the operands of the call, and the fastest is remembered. A backend that is asked for by name is
never replaced: its own module launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraxs_kernels.backends import roles, triton
from loraxs_kernels.backends.cuda import plan as cuda_plan
from loraxs_kernels.backends.problem import gpu_of, problem_of, software
from loraxs_kernels.backends.roles import Operands
from loraxs_kernels.backends.triton import plan as triton_plan
from loraxs_kernels.backends.triton.plan import Gpu, Problem

Winner = cuda_plan.Plan | triton_plan.Plan | str


@dataclass(frozen=True)
class Chosen:
    """What runs a kind of call. ``tuned``: by measurement."""

    run: Callable[[Operands], None]
    tuned: bool


_chosen: dict[Any, Chosen] = {}
_MOST_CHOSEN = 4096


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``(y [M, N], q [M, r])``; arguments as in :func:`loraxs_kernels.ops.forward`."""
    return roles.forward(launch, *arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx [M, K], dR like R, db [N])``; arguments as in :func:`loraxs_kernels.ops.backward`."""
    from loraxs_kernels.backends.triton.launch import atomic_core_gradient

    if atomic_core_gradient():  # which only one of them can do
        return triton.backward(*arguments)
    return roles.backward(launch, *arguments)


def launch(o: Operands) -> None:
    """Run one pass: exactly one kernel (unless tuning found library products to be faster)."""
    from loraxs_kernels.backends.triton import autotune

    key = (*roles.kind_of(o), torch.backends.cuda.matmul.allow_tf32)
    chosen = _chosen.get(key)
    if chosen is None or (not chosen.tuned and autotune.measuring()):
        if len(_chosen) >= _MOST_CHOSEN:
            _chosen.clear()
        chosen = _chosen[key] = _first_time(o)
    chosen.run(o)


def cheapest(
    problem: Problem, element: str, direction: str, gpu: Gpu, library: Any, *, vectors: bool
) -> Winner:
    """The plan that arithmetic prefers; the CUDA kernels' if both cost the same."""
    ours = cuda_plan.candidates(problem, element, direction, gpu, library, vectors=vectors)
    theirs = triton_plan.candidates(problem, gpu)
    if not ours:
        return triton_plan.choose(problem, gpu)
    kernel = next(k for k in library[1] if k.name == ours[0].kernel)
    cost = cuda_plan.cost(problem, gpu, kernel, ours[0])
    if theirs and triton_plan.cost(problem, gpu, theirs[0]) < cost:
        return theirs[0]
    return ours[0]


class Sized(NamedTuple):
    """What a layer of some size gets: a backend's name, and its plan in words."""

    backend: str
    plan: str


def for_sizes(
    rows: int, out: int, inner: int, rank: int, dtype: torch.dtype, *, per_row: bool = False
) -> Sized:
    """What arithmetic prefers for an aligned layer's forward on the current GPU, for people."""
    problem = Problem(rows, out, inner, rank, dtype.itemsize, per_row=per_row)
    device = torch.device("cuda", torch.cuda.current_device())
    element = str(dtype).removeprefix("torch.")
    vectors = out % 8 == inner % 8 == rank % 8 == 0
    plan = cheapest(
        problem, element, "forward", gpu_of(device), cuda_plan.kernels(), vectors=vectors
    )
    assert not isinstance(plan, str)
    return Sized("cuda" if isinstance(plan, cuda_plan.Plan) else "triton", plan.describe())


def _first_time(o: Operands) -> Chosen:
    from loraxs_kernels.backends.cuda.launch import all_vectors, direction_of
    from loraxs_kernels.backends.triton import autotune

    gpu, problem = gpu_of(o.x.device), problem_of(o)
    winner: Winner | None = None
    if torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled():
        key = "any | " + autotune.key_of(
            software(o.x.device), problem, f"{o.x.dtype} {o.core.dtype}"
        )
        winner = autotune.winners().get(key)
        if winner is None and autotune.measuring():
            winner = autotune.race(_contenders(o, problem, gpu), autotune.time_on_gpu)
            autotune.remember(key, winner)
    if winner is not None:
        return Chosen(_runner(o, winner), tuned=True)
    element = str(o.x.dtype).removeprefix("torch.")
    plan = cheapest(
        problem, element, direction_of(o), gpu, cuda_plan.kernels(), vectors=all_vectors(o)
    )
    return Chosen(_runner(o, plan), tuned=False)


def _contenders(o: Operands, problem: Problem, gpu: Gpu) -> dict[Any, Callable[[], None]]:
    from loraxs_kernels.backends.cuda import launch as cuda_launch
    from loraxs_kernels.backends.triton import launch as triton_launch

    return {
        **triton_launch.contenders(o, gpu, problem),
        **cuda_launch.contenders(o, problem, gpu),
    }


def _runner(o: Operands, winner: Winner) -> Callable[[Operands], None]:
    """What launches ``winner`` for operands of o's kind."""
    from loraxs_kernels.backends.cuda import launch as cuda_launch
    from loraxs_kernels.backends.triton import launch as triton_launch
    from loraxs_kernels.backends.triton import two_step

    if isinstance(winner, str):
        return two_step.run
    if isinstance(winner, cuda_plan.Plan):
        return functools.partial(_run_cuda, cuda_launch.prepare(o, winner))
    ready = triton_launch.load(o, gpu_of(o.x.device), winner)
    return functools.partial(_run_triton, ready)


def _run_cuda(ready: Any, o: Operands) -> None:
    from loraxs_kernels.backends.cuda import launch as cuda_launch

    cuda_launch.run(o, ready)


def _run_triton(ready: Any, o: Operands) -> None:
    from loraxs_kernels.backends.triton import launch as triton_launch

    triton_launch.run_prepared(o, ready)
