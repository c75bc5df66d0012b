"""``pytest bench/``: the contenders of ``bench_multi`` under pytest-benchmark, on the CPU.

Not part of ``make test``, and no timing fails: compare the groups of the printed table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.gpu_timing import input_sets
from bench.linear_cases import Weights
from bench.multi_cases import (
    MultiCase,
    MultiOperands,
    check_agreement,
    contenders,
    quick_cases,
)

CONTENDERS = ("ours", "ours raw ids", "single", "loop", "bmm", "lora gather", "lora segments")


@pytest.fixture(scope="module", params=quick_cases("cpu"), ids=str)
def prepared(request: pytest.FixtureRequest) -> Iterator[tuple[MultiCase, dict[str, Any]]]:
    case: MultiCase = request.param
    with torch.set_grad_enabled(case.layer.trains):
        weights = Weights(case.layer.shape, case.layer.dtype)
        ops = MultiOperands(case, weights, "cpu")
        found, _ = contenders(case, ops, weights)
        [(x, grad_y)] = input_sets(ops.x, ops.grad_y, 1, trains=case.layer.trains)
        calls: dict[str, Any] = {
            name: functools.partial(contender.step, x, grad_y) for name, contender in found.items()
        }
        check_agreement(case, found, calls)
    yield case, calls


@pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("name", CONTENDERS)
def test_multi(benchmark: Any, prepared: tuple[MultiCase, dict[str, Any]], name: str) -> None:
    case, calls = prepared
    if name not in calls:
        pytest.skip(f"{name} cannot run this case")
    benchmark.group = str(case)
    benchmark.extra_info.update(vars(case.layer), adapters=case.adapters, contender=name)
    with torch.set_grad_enabled(case.layer.trains):
        benchmark(calls[name])
