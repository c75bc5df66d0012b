"""The fused Triton kernel, compiled for sm_80 and sm_90 and executed from its PTX.

What it computes, what it costs, and that it ends whatever the order of its CTAs.

The interpreter raises at every race, access out of bounds, missing wait or deadlock, so each test
here is also a test of these. Formulas of the costs: ``triton_ptx.cost``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)

from loraxs_kernels.backends import flags, reference
from loraxs_kernels.backends import triton as backend
from loraxs_kernels.backends.triton import launch
from tests import oracle
from tests.triton_interpreter.common import Case
from tests.triton_ptx import (
    Device,
    Executed,
    allowed_tf32,
    cost,
    execute_small,
    install,
    small_plan,
)
from tools import triton_resources as table

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    flags._by_stream.clear()
    yield install(monkeypatch, Device())
    for held in flags._by_stream.values():
        assert not held.any(), "a launch left flags behind"


def _written_once(e: Executed) -> None:
    rank = e.facts["rank"]
    for name in ("d_ptr", "side_ptr", "dr_ptr", "db_ptr"):
        if e.pointers[name] is not None:
            counts = e.run.buffers[name].write_counts
            # The rows of a scratch P are padded to whole vectors.
            assert ((counts[:, :rank] if name == "side_ptr" else counts) == 1).all(), name
            assert e.run.buffers[name].stray_writes == 0


def _gate(e: Executed, *, conflict: float = 1.0) -> None:
    """FLOPs, bytes, bank conflicts, widths and write counts of one launch of aligned operands."""
    report, limit = e.run.report, cost(e)
    assert report.tensor_flops == limit.needed + limit.redundant
    assert e.moved() <= 1.15 * limit.moved
    assert e.k_loops() and e.worst_conflict() == conflict
    _written_once(e)
    # The K loops load nothing but by cp.async, X and W 16 bytes at a time (an A may be too small to
    # give each thread so much).
    assert set(e.global_widths(loops=True)) <= {"cp.async"}
    assert e.wide_bytes() >= limit.streamed


def _both(device: Device, case: Case, plan: Any, **gate: Any) -> dict[str, Tensor]:
    """Both passes, one launch each, beside the definition and within the gates."""
    got = case.check(plan)
    assert len(device.runs) == 2
    for e in device.runs:
        assert e.run.report.launches == 1
        _gate(e, **gate)
    return got


MATRIX = [
    (80, "ride-along", 12, {}),
    (80, "resident", 64, {"parts": 2}),
    (80, "ticket", 20, {}),
    (90, "ride-along", 20, {}),
    (90, "resident", 12, {}),
    (90, "ticket", 64, {"BR": 32}),
]
EVERY: list[tuple[int, str, int, dict[str, int]]] = [
    (arch, scheme, rank, {})
    for arch in (80, 90)
    for scheme in ("ride-along", "resident", "ticket")
    for rank in (12, 16, 20, 64, 128)
    if scheme != "ride-along" or rank <= 64
]


@pytest.mark.parametrize(
    ("arch", "scheme", "rank", "changes"),
    [*MATRIX, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in EVERY)],
)
def test_values_and_costs(
    device: Device, arch: int, scheme: str, rank: int, changes: dict[str, int]
) -> None:
    """Tails in M, N, K and rank; bias; a scaling of 0.7; float32 R under bfloat16."""
    device.arch = arch
    case = Case(100, 72, 88, rank, BF16, FP32)
    _both(device, case, small_plan(scheme, rank, **changes))
    instruction = "wgmma.mma_async" if arch == 90 else "mma.sync"
    for e in device.runs:
        assert any(name.startswith(instruction) for name in e.run.report.instructions)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [("ticket", FP16), *(pytest.param(s, BF16, marks=pytest.mark.exhaustive)
                         for s in ("ride-along", "resident", "ticket"))],
)  # fmt: skip
def test_rows_at_odd_addresses(device: Device, scheme: str, dtype: torch.dtype) -> None:
    """Nothing is a multiple of anything; R in the input's type; a scaling above one."""
    Case(70, 37, 67, 20, dtype, scaling=3.0).check(small_plan(scheme, 20))
    for e in device.runs:
        assert e.run.report.tensor_flops == cost(e).needed + cost(e).redundant
        _written_once(e)


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [(90, "ticket"), *(pytest.param(*c, marks=pytest.mark.exhaustive)
                       for c in ((80, "ride-along"), (80, "ticket"), (90, "resident")))],
)  # fmt: skip
def test_float32_as_three_tf32_products(device: Device, arch: int, scheme: str) -> None:
    device.arch = arch
    _both(device, Case(70, 40, 72, 16), small_plan(scheme, 16, BK=16))


def _tf32(t: Tensor) -> Tensor:
    """What the tensor core reads of a float32: ten bits of the fraction."""
    return (t.view(torch.int32) & ~0x1FFF).view(FP32)


@pytest.mark.parametrize("arch", [80, 90])
def test_float32_as_tf32(device: Device, arch: int) -> None:
    """Where PyTorch's own products may: one product, with no more error than one of them has."""
    device.arch = arch
    launch.plan_override = lambda problem, gpu: small_plan("ticket", 16, BK=16)
    case = Case(70, 40, 72, 16)
    with allowed_tf32():
        got = case.run(backend, None, None)
    truth = case.run(reference, torch.float64, None)
    case.views = dict.fromkeys(("x", "weight", "A", "B", "grad_y"), _tf32)
    peer = case.run(reference, torch.float64, None)
    for name, value in got.items():
        rows = truth[name].flatten(), value.double().flatten(), [peer[name].flatten()]
        oracle.rule(name, *rows, 2 * torch.finfo(FP32).eps)
    assert len(device.runs) == 2
    for e in device.runs:
        assert e.run.report.tensor_flops == cost(e).needed + cost(e).redundant
        _written_once(e)


def test_infinities_stay_where_they_belong(device: Device) -> None:
    """Three products of parts: inf - inf must not reach the sum, nor a NaN be lost."""
    device.arch = 80
    launch.plan_override = lambda problem, gpu: small_plan("ticket", 16, BK=16)
    x, ones = torch.ones(3, 16), torch.ones(16, 16)
    # A NaN as the GPU makes them: rounding its bits as an integer would give zero.
    nan = torch.tensor(2**31 - 1, dtype=torch.int32).view(FP32)
    x[0, 0], x[1, 5], x[2, 3] = torch.inf, -torch.inf, nan
    y, _ = backend.forward(
        x, ones, None, ones, ones, ones, None, None, None, None, None, 1.0, 0.0, 0
    )
    want = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]]).expand(3, 16)
    torch.testing.assert_close(y, want, equal_nan=True)


TMA = [
    (90, "ticket", 20, {}),
    pytest.param(90, "ticket", 64, {"BR": 32}, marks=pytest.mark.exhaustive),
    *(pytest.param(90, scheme, rank, {}, marks=pytest.mark.exhaustive)
      for scheme in ("ride-along", "resident", "ticket") for rank in (12, 16, 64)),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "scheme", "rank", "changes"), TMA)
def test_tiles_by_descriptors(
    device: Device, arch: int, scheme: str, rank: int, changes: dict[str, int]
) -> None:
    """The copy engine reads X and W (transposed in the backward), and A where its rows allow it."""
    device.arch = arch
    _both(
        device, Case(100, 72, 88, rank, BF16, FP32), small_plan(scheme, rank, tma=True, **changes)
    )
    for e in device.runs:
        texts = [
            e.run.report.lines[n].text for n in set().union(*e.k_loops()) & set(e.run.report.lines)
        ]
        assert any("cp.async.bulk.tensor" in text for text in texts)
        # Only an A whose rows do not start at multiples of 16 bytes comes by the threads' loads.
        if e.facts["A_DESC"]:
            assert all("cp.async.bulk.tensor" in text for text in texts)


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [(90, "ticket"), *(pytest.param(*c, marks=pytest.mark.exhaustive)
                       for c in ((80, "ticket"), (80, "resident"), (90, "resident")))],
)  # fmt: skip
def test_dropout(device: Device, arch: int, scheme: str) -> None:
    """The values of both passes, then the mask itself, element by element."""
    device.arch = arch
    plan = small_plan(scheme, 16)
    Case(70, 40, 72, 16, BF16, FP32, dropout_p=0.3).check(plan)
    launch.plan_override = lambda problem, gpu: plan
    # Of a block of columns, whose counters pass 2**32.
    rows, k, p = 70, 40, 0.25
    seed = reference.column_block_seed(torch.tensor([-0x1234567887654322]), 2**32 - 1700, 50)
    keep = reference.dropout_mask(seed, rows, k, p).to(BF16) * torch.tensor(1 / (1 - p), dtype=BF16)
    # Sixteen columns of x = 1 go straight into q.
    A = torch.eye(16, k, dtype=BF16).roll(11, 1)
    W, R, B = (torch.zeros(s, dtype=BF16) for s in ((8, k), (16, 16), (8, 16)))
    x = torch.ones(rows, k, dtype=BF16)
    _, q = backend.forward(
        x, W, None, A, R, B, None, seed, None, None, None, 1.0, p, 0,
    )  # fmt: skip
    assert torch.equal(q, keep[:, 11:27])
    # dL/dy = e_0, and everything behind it is one: dx is the mask.
    g = torch.zeros(rows, 8, dtype=BF16)
    g[:, 0] = R[0, 0] = B[0, 0] = 1
    dx, _, _ = backend.backward(
        g, q, W, torch.ones_like(A), R, B, seed, None, None, None, 1.0, p, True, True, True, 0
    )
    assert torch.equal(dx, keep)


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [(80, "ticket"), *(pytest.param(*c, marks=pytest.mark.exhaustive)
                       for c in ((80, "resident"), (90, "resident"), (90, "ticket")))],
)  # fmt: skip
def test_shuffled_ids_with_bad_ones(device: Device, arch: int, scheme: str) -> None:
    """A row with -1 has no adapter, nor has one whose id is out of range, which is reported."""
    device.arch = arch
    case = Case(70, 40, 72, 12, BF16, FP32, adapters=3, need=(True, True, False))
    case.tensors()
    ids = case.ids
    assert ids is not None and (ids == -1).any()
    ids[5], ids[66] = -1, -1
    plan = small_plan(scheme, 12, CM=16)
    right = case.check(plan)
    case.ids = ids.clone()
    case.ids[5], case.ids[66] = 3, 5_000_000_000
    launch.plan_override = lambda problem, gpu: plan
    with pytest.raises(ValueError, match="adapter_ids"):
        case.run(backend, None, None)  # the backward tells what the forward met
    y = device.runs[-1].pointers["d_ptr"]
    assert y is not None and torch.equal(y, right["y"])
    for e in device.runs:
        _gate(e)


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [(90, "resident"), *(pytest.param(*c, marks=pytest.mark.exhaustive)
                         for c in ((80, "ticket"), (80, "resident"), (90, "ticket")))],
)  # fmt: skip
def test_sorted_ids(device: Device, arch: int, scheme: str) -> None:
    device.arch = arch
    ids = torch.randint(-1, 4, (70,), generator=torch.Generator().manual_seed(1)).sort().values
    case = Case(
        70, 40, 72, 20, BF16, FP32, adapters=5, ids=ids, sort=True, need=(True, True, False)
    )
    got = _both(device, case, small_plan(scheme, 20, CM=16))
    assert not got["dR"][4].any(), "an adapter without rows"


ORDERS = [(order, n) for order in ("linear", "reversed", "random") for n in (1, 2, None)]
SOME = [("linear", 1), ("reversed", 2), ("random", None)]


def _bits(device: Device, scheme: str, order: str, residency: int | None) -> list[Tensor]:
    device.order = random.Random(5) if order == "random" else order
    device.residency = residency
    case = Case(140, 40, 72, 16, BF16, FP32)
    got = case.run(backend, None, None)
    return [got[name] for name in ("dR", "db", "dx", "y", "q")]


@pytest.mark.parametrize(
    ("arch", "scheme", "tried"),
    [
        (80, "ride-along", SOME),
        (90, "resident", SOME),
        (80, "ticket", SOME),
        *(pytest.param(arch, scheme, ORDERS, marks=pytest.mark.exhaustive)
          for arch in (80, 90) for scheme in ("ride-along", "resident", "ticket")),
    ],
)  # fmt: skip
def test_any_order_of_ctas_gives_the_same_bits(
    device: Device, arch: int, scheme: str, tried: list[tuple[str, int | None]]
) -> None:
    """And ends: with one CTA resident, two, or all; started in order, in reverse or at random."""
    device.arch = arch
    plan = small_plan(scheme, 16, chunks=2)
    launch.plan_override = lambda problem, gpu: plan
    first = _bits(device, scheme, *tried[0])
    assert not any(t.isnan().any() for t in first)
    for order, residency in tried[1:]:
        for a, b in zip(first, _bits(device, scheme, order, residency), strict=True):
            assert torch.equal(a, b), (order, residency)
    for e in device.runs:
        _written_once(e)


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", ["ride-along", "resident", "ticket"])
@pytest.mark.parametrize("arch", [80, 90])
def test_update_of_a_base_output(device: Device, arch: int, scheme: str) -> None:
    device.arch = arch
    Case(70, 40, 72, 20, BF16, FP32, update=True, need=(True, True, False)).check(
        small_plan(scheme, 20)
    )
    for e in device.runs:
        assert e.run.report.tensor_flops == cost(e).needed + cost(e).redundant
        _written_once(e)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("rank", [16, 64, 256])
@pytest.mark.parametrize("arch", [80, 90])
def test_the_tiles_that_are_chosen(arch: int, rank: int, backward: bool) -> None:
    """The gates hold for the chooser's own tiles, in every scheme, by either way of copying."""
    gpu = table.GPUS[arch]
    plans = table.plans(table.operands(8192, 4096, 4096, rank, backward=backward), gpu)
    if arch >= 90:
        plans.append(replace(plans[0], tma=not plans[0].tma))
    for plan in plans:
        _gate(execute_small(plan, arch, rank, backward=backward))
