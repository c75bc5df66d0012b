"""``pytest bench/``: the contenders of ``bench_linear`` under pytest-benchmark.

Not part of ``make test``, and no timing fails: compare the groups of the printed table. Here the
contenders run one after another; ``bench_linear`` lets them take turns, which is fairer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.linear_cases import Case, Weights, check_agreement, contenders

CASES = [
    Case(*shape, rows, rank, dtype, what)
    for shape, rows, rank, dtype in (
        ((384, 384), 1, 16, "fp32"),
        ((384, 1536), 128, 16, "fp32"),
        ((1024, 1024), 16, 16, "fp32"),
        ((1024, 1024), 512, 64, "fp32"),
        ((1024, 1024), 512, 16, "bf16"),
        ((4096, 4096), 16, 16, "fp32"),
    )
    for what in ("fwd", "fwdbwd")
]
CONTENDERS = ("ours", "bare plain", "bare packed", "bare packed for M", "eager", "eigentune")


@pytest.fixture(scope="module", params=CASES, ids=str)
def prepared(request: pytest.FixtureRequest) -> Iterator[tuple[Case, dict[str, Any]]]:
    case: Case = request.param
    with torch.set_grad_enabled(case.trains):
        calls, _ = contenders(case, Weights(case.shape, case.dtype), with_compile=False)
        check_agreement(case, calls)
    yield case, calls


@pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("name", CONTENDERS)
def test_linear(benchmark: Any, prepared: tuple[Case, dict[str, Any]], name: str) -> None:
    case, calls = prepared
    if name not in calls:
        pytest.skip(f"{name} is not installed or cannot run this case")
    benchmark.group = str(case)
    benchmark.extra_info.update(vars(case), contender=name, flop_tax=case.flop_tax)
    with torch.set_grad_enabled(case.trains):
        benchmark(calls[name])
