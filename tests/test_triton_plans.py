"""The choice of a plan, measured or not: pure functions, so they need neither GPU nor kernel."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from loraxs_kernels.backends import reference
from loraxs_kernels.backends.triton import autotune, two_step
from loraxs_kernels.backends.triton import plan as planning
from loraxs_kernels.backends.triton.launch import Operands, split_scaling
from loraxs_kernels.backends.triton.plan import Gpu, Plan, Problem
from tests import oracle

H100 = Gpu(90, 132, 227 * 1024)
B200 = Gpu(100, 148, 227 * 1024)
GPUS = [Gpu(80, 108, 163 * 1024), Gpu(89, 128, 99 * 1024), H100, B200, Gpu(120, 170, 99 * 1024)]
GPUS.append(Gpu(99, 7, 64 * 1024))  # nobody has heard of this one


KINDS: list[dict[str, Any]] = [
    {}, {"mask_output": True}, {"per_row": True, "adapters": 1000}, {"has_w": False},
    {"has_d": False}, {"vectors": False},
]  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS, ids=str)
@pytest.mark.parametrize("rank", [1, 16, 25, 64, 136, 512])
def test_every_problem_gets_a_plan_that_fits(rank: int, gpu: Gpu) -> None:
    shapes = itertools.product((1, 17, 64, 65, 1000, 10**6), ((1, 7), (768, 768), (4096, 11008)))
    for (M, (N, K)), size, kind in itertools.product(shapes, (2, 4), KINDS):
        p = Problem(M, N, K, rank, size, need_dR=True, **kind)
        plan = planning.choose(p, gpu)
        assert planning.shared_bytes(p, plan) <= gpu.shared
        assert plan.scheme in planning.schemes(p)
        assert plan.chunks >= 1 and plan.parts >= 1


def test_the_scheme_follows_the_arithmetic() -> None:
    def scheme(M: int, N: int, K: int, rank: int) -> int:
        return planning.choose(Problem(M, N, K, rank, 2), H100).scheme

    # A small product: a flag per tile would cost more than X A^T in every tile.
    assert scheme(M=2048, N=768, K=768, rank=16) == planning.RIDE_ALONG
    # A large rank in every tile, or in every part of a row block, costs more than flags.
    assert scheme(M=8192, N=4096, K=4096, rank=256) == planning.TICKET
    # Few rows: whoever rides along reads A once per tile.
    assert scheme(M=8, N=4096, K=4096, rank=16) == planning.TICKET


def test_descriptors_are_used_where_they_save_more_than_they_cost() -> None:
    def uses(gpu: Gpu, K: int, rows: int = 8192, descriptors: bool = True) -> bool:
        p = Problem(rows, 4096, K, 64, 2, descriptors=descriptors)
        return planning.choose(p, gpu).tma

    assert uses(H100, K=4096)
    assert not uses(H100, K=4096, descriptors=False), "rows at odd addresses"
    assert not uses(H100, K=256), "too few steps to make up for the fetch"
    assert not uses(H100, K=4096, rows=32), "too small a tile"
    assert not uses(GPUS[0], K=4096), "no copy engine"


def test_both_ways_of_copying_are_measured() -> None:
    p = Problem(8192, 4096, 4096, 64, 2, descriptors=True)
    best = planning.choose(p, H100)
    assert dataclasses.replace(best, tma=not best.tma) in autotune.neighbours(p, H100)
    assert not any(plan.tma for plan in autotune.neighbours(p, GPUS[0]))


@pytest.mark.parametrize("has_w", [True, False])
def test_a_masked_input_takes_shorter_steps_where_a_loop_over_tiles_needs_registers(
    has_w: bool,
) -> None:
    p = Problem(8192, 4096, 4096, 64, 2, has_w=has_w, descriptors=True)

    def steps(gpu: Gpu, **changes: Any) -> dict[int, int]:
        problem = dataclasses.replace(p, **changes)
        return {plan.scheme: plan.BK for plan in planning.candidates(problem, gpu)}

    assert steps(B200, mask_input=True) == {planning.RESIDENT: 32, planning.TICKET: 64}
    assert steps(B200) == steps(H100, mask_input=True)
    assert steps(B200) == {planning.RESIDENT: 64, planning.TICKET: 64}


def test_no_plan_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match="1024 bytes of shared memory"):
        planning.choose(Problem(512, 512, 512, 16, 2), Gpu(90, 132, 1024))


@pytest.mark.parametrize("s", [0.0, 1.0, -1.0, 0.3, 1.5, -7.0, 1e30, 3e38, float("inf")])
def test_scaling_is_split_exactly(s: float) -> None:
    fraction, before, after = split_scaling(s)
    assert fraction * after == s and before * after == 1.0
    assert abs(fraction) <= 1.0 or abs(s) > 2.0**100


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "folder" / "autotune.json"
    monkeypatch.setenv("LORAXS_AUTOTUNE_CACHE", str(path))
    monkeypatch.setattr(autotune, "_winners", None)
    yield path


def test_the_fastest_wins_and_is_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"slow": 3.0, "fast": 1.0, "middle": 2.0}
    calls: list[str] = []
    runners: dict[Any, Callable[[], None]] = {
        name: functools.partial(calls.append, name) for name in clock
    }

    def timed(run: Any) -> float:
        run()
        return clock[calls[-1]]

    assert autotune.race(runners, timed) == "fast"
    assert calls[:6] == [*clock, *clock], "one round to warm up, then in turns"
    problem = Problem(100, 200, 300, 16, 2)
    plans = autotune.neighbours(problem, H100)
    assert len(plans) > 3 and len(set(plans)) == len(plans)
    key = autotune.key_of("a GPU", problem, "bf16 fp32")
    autotune.remember(key, plans[1])
    autotune.remember(key + "x", autotune.TWO_STEP)
    assert set(json.loads(cache.read_text())) == {key, key + "x"}
    monkeypatch.setattr(autotune, "_winners", None)
    assert autotune.winners() == {key: plans[1], key + "x": autotune.TWO_STEP}
    assert isinstance(autotune.winners()[key], Plan)


def test_a_broken_cache_is_reported_and_ignored(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert autotune.winners() == {}


def test_nothing_is_measured_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAXS_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not autotune.measuring()
    with autotune.autotune():
        assert autotune.measuring()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not autotune.measuring()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        torch.use_deterministic_algorithms(True)
        try:
            assert not autotune.measuring()
        finally:
            torch.use_deterministic_algorithms(False)
    assert not autotune.measuring()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_two_steps_compute_the_same(p: float, per_row: bool) -> None:
    made = oracle.problem(30, 20, 25, 6, adapters=4 if per_row else None).to(torch.float64)
    x, W, A, R, B, G = made.x, made.weight, made.A, made.R, made.B, made.grad_y
    seed = torch.tensor([5]) if p else None
    y, q = torch.full((30, 25), torch.nan).double(), torch.full((30, 6), torch.nan).double()
    given: dict[str, Any] = {"scaling": 0.7, "dropout_p": p, "seed": seed, "ids": made.ids}
    two_step.run(Operands(x=x, w=W, a=A, core=R.mT, b=B, bias=made.bias, d=y, side=q, **given))
    none = (None, None)
    want_y, want_q = reference.forward(
        x, W, None, A, R, B, made.bias, seed, made.ids, *none, 0.7, p, 0
    )  # fmt: skip
    torch.testing.assert_close((y, q), (want_y, want_q))
    dx, dR, db = torch.empty_like(x), torch.empty_like(R), torch.empty_like(made.bias)
    two_step.run(
        Operands(
            x=G, w=W.mT, a=B.mT, core=R, b=A.mT, d=dx, q=q, dR=dR, db=db, mask_output=True, **given
        )
    )  # fmt: skip
    want = reference.backward(G, q, W, A, R, B, seed, made.ids, *none, 0.7, p, *(True,) * 3, 0)
    torch.testing.assert_close((dx, dR, db), want)
