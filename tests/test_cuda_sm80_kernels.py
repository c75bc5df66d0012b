"""The training kernels of csrc/cuda/sm80, each alone, executed from the PTX of the built library.

What they compute, what it costs, and that it ends with the same bits whatever the order of the
CTAs. The interpreter raises at every race, access out of bounds, missing wait or deadlock, so each
test here is also a test of these. Formulas of the costs: ``tests/cuda_sm80.py``.
"""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton, whose wheel brings cuobjdump, is not installed")

from loraxs_kernels.backends.cuda import plan
from tests import oracle
from tests.cuda_device import require_library
from tests.cuda_layer import (
    BF16,
    DIRECTIONS,
    ELEMENTS,
    FP16,
    FP32,
    Pass,
    both,
    check_one_rounding,
    check_update,
    kernel_of,
    pitch,
)
from tests.cuda_ptx import execute, operands
from tests.cuda_sm80 import SCHEMES, Case, facts, flops, least

require_library()


def _gate(p: Pass) -> None:
    """FLOPs, bytes, bank conflicts, and 16-byte copies in the loops along K."""
    counted = flops(p)
    assert p.flops == counted.needed + counted.again
    assert p.moved <= 1.15 * least(p)
    assert p.main_loops() and p.conflicts() == 0


VALUES = [
    Case("ride_along", 100, 88, 136, 16),
    Case("ticket", 100, 88, 136, 72),
    Case("ride_along", 40, 72, 88, 12, FP16, FP16),
    Case("ticket", 150, 72, 88, 20, FP16, FP16),
]
EVERY = [
    Case(scheme, rows, k, n, rank, dtype, core)
    for scheme in ("ride_along", "ticket")
    for rank in (4, 12, 16, 25, 64, 136, 256)
    if scheme == "ticket" or rank <= 16
    for rows, k, n in ((1, 72, 136), (129, 264, 40))
    for dtype in (BF16, FP16)
    for core in (FP32, dtype)
]


@pytest.mark.parametrize(
    "case",
    [*VALUES, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in EVERY)],
    ids=str,
)
def test_values_and_costs(case: Case) -> None:
    """Tails in M, N, K and rank; a bias; R in fp32 and in the input's type."""
    both(case, _gate)


@pytest.mark.parametrize(
    "case",
    [
        Case("unaligned", 50, 67, 37, 25, scaling=3.0),
        Case("unaligned", 50, 66, 38, 20, FP16, scaling=-40.0),
        *(
            pytest.param(Case("unaligned", 130, k, n, rank, dtype), marks=pytest.mark.exhaustive)
            for k, n in ((135, 91), (64, 130), (73, 128))
            for rank in (3, 64, 70)
            for dtype in (BF16, FP16)
        ),
    ],
    ids=str,
)
def test_rows_at_any_address(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is a multiple of anything, or all of two elements only; a scaling above one."""
    monkeypatch.setattr(oracle, "S", case.scaling)
    odd = case.k % 2
    skew = {"x": 2, "w": 6, "a": 2, "b": 10, "d": 2, "side": 6, "q": 2, "bias": 2}
    case.how["skew"] = {name: skew[name] * (1 if odd else 2) for name in skew}
    case.views = {name: pitch(3 if odd else 2) for name in ("x", "w", "a", "b", "g")}
    computed, forward, backward = case.run()
    oracle.check(computed)
    for p in (forward, backward):
        counted = flops(p)
        assert p.flops == counted.needed + counted.again


def test_only_x_and_w_have_to_be_aligned() -> None:
    """Ranks of 20 leave A and B without vectors; X and W are still copied 16 bytes at a time."""
    for scheme, rank in (("ticket", 20), ("ride_along", 6)):
        case = Case(scheme, 60, 72, 136, rank)
        forward, backward = both(case, _gate)
        for p in (forward, backward):
            wide = [line for line in p.done.report.lines.values() if "cp.async.cg" in line.text]
            f = p.operands.fields
            reads = 2 * f["k"] * (f["m"] * (f["col_tiles"] + f["slices"]) + f["n"])
            assert sum(line.load_bytes for line in wide) >= reads
            assert {width for line in wide for width in line.widths} == {16}


@pytest.mark.parametrize("rank", [20, pytest.param(72, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("ids", "sort"),
    [
        ([n * 5 % 9 - 1 for n in range(90)] + [1 << 40, -5, 9], False),
        ([-1] * 40 + [0] * 33 + [5] * 9 + [7], True),
        pytest.param([n * 5 % 9 - 1 for n in range(140)], True, marks=pytest.mark.exhaustive),
        pytest.param([7] * 70, False, marks=pytest.mark.exhaustive),
        pytest.param([-1] * 70, False, marks=pytest.mark.exhaustive),
        pytest.param(list(range(8)) * 9, False, marks=pytest.mark.exhaustive),
    ],
    ids=["bad", "sorted", "mixed-sorted", "one", "none", "distinct"],
)
def test_a_core_per_row(ids: list[int], sort: bool, rank: int) -> None:
    """Unsorted, sorted, -1, out of range (reported); adapters without rows get zeros."""
    case = Case("ticket", len(ids), 72, 136, rank, adapters=8, ids=torch.tensor(ids), sort=sort)
    for p in both(case, _gate):
        assert sort or bool(p["bad_id"]) == any(i < -1 or i >= 8 for i in ids)
        without = torch.tensor([i < 0 or i >= 8 for i in ids])
        assert not p["t"][without].any()
        if "dr" in p:
            for adapter in set(range(8)) - set(ids):
                assert not p["dr"][adapter].any()


@pytest.mark.parametrize("adapters", [40, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_many_adapters(adapters: int) -> None:
    """More adapters than rows: dR of each is written, mostly zeros."""
    last = adapters - 1
    ids = torch.tensor([last, 3, 20, 3, last - 1] * 5)
    case = Case("ticket", 25, 40, 40, 4, adapters=adapters, ids=ids, sort=True, chunks=1)
    p64, p = case.problems()
    got = case.backward(p, case.forward(p)["side"], w=None, has_d=False, need_db=False)
    truth = oracle.results(lambda x, R, b: oracle.eager(p64, x, R, b), p64)["dR"]
    eager = oracle.results(lambda x, R, b: oracle.eager(p, x, R, b), p)["dR"]
    slack = 2 * torch.finfo(FP32).eps
    oracle.rule("dR", truth, got["dr"].double(), [eager.double()], slack)


def test_one_adapter_does_not_touch_anothers_rows() -> None:
    """A core that diverged (inf, NaN) spoils its own rows alone."""
    case = Case("ticket", 40, 72, 40, 16, adapters=3, ids=torch.tensor([0, 1, 2, -1] * 10))
    _, p = case.problems()
    right = case.forward(p)["d"]
    p.R[1] = float("inf")
    spoilt = case.forward(p)["d"]
    rows = torch.tensor([True, False, True, True] * 10)
    assert torch.equal(spoilt[rows], right[rows]) and not spoilt[~rows].isfinite().any()


@pytest.mark.parametrize("scheme", ["ride_along", "ticket"])
def test_an_update_of_a_base(scheme: str) -> None:
    """No W: D = base + s (Q R') B'^T; the base is read, not written, and has a pitch of its own."""
    check_update(Case(scheme, 40, 136, 200, 16), _gate)


def test_bias_and_base_are_added_before_the_one_rounding() -> None:
    check_one_rounding(Case("ticket", 40, 72, 136, 16))


def test_dR_without_dX() -> None:
    case = Case("ticket", 90, 72, 136, 24)
    (_, _, p), forward, whole = case.run()
    alone = case.backward(p, forward["side"], w=None, has_d=False, need_db=False)
    _gate(alone)
    assert torch.equal(alone["dr"], whole["dr"])
    assert "d" not in alone and "db" not in alone


@pytest.mark.parametrize("scheme", ["ride_along", "ticket"])
@pytest.mark.parametrize("scaling", [3e4, -0.0])
def test_scaling(scheme: str, scaling: float) -> None:
    """One that would overflow T in fp16, where the product itself does not; and zero."""
    case = Case(scheme, 20, 72, 64, 16, FP16, scaling=scaling)
    p = case.problems()[1]
    p.A = p.A / 256
    p.R = p.R / 64
    got = case.forward(p)["d"].double()
    wide = p.to(torch.float64)
    true = wide.x @ wide.weight.T + wide.bias
    true = true + scaling * (wide.x @ wide.A.T @ wide.R.T @ wide.B.T)
    q = (p.x @ p.A.T).float()
    t = (q @ p.R.T * (scaling / 2**15)).half()
    other = p.x.float() @ p.weight.float().T + p.bias + t.float() @ p.B.float().T * 2**15
    oracle.rule("y", true, got, [other.half().double()], 2 * torch.finfo(FP16).eps)


ORDERS: list[dict[str, Any]] = [
    {"residency": residency, "order": order}
    for residency in (1, 2, None)
    for order in ("linear", "reversed", "random")
]
SOME = [ORDERS[0], ORDERS[4], ORDERS[8]]


@pytest.mark.parametrize(
    ("scheme", "ways"),
    [
        ("ride_along", SOME),
        ("ticket", SOME),
        *(pytest.param(s, ORDERS, marks=pytest.mark.exhaustive) for s in SCHEMES),
    ],
)
def test_same_bits_in_any_order(scheme: str, ways: list[dict[str, Any]]) -> None:
    """CTAs one by one, two at a time, all; from the first, from the last, at random."""
    found = []
    for way in ways:
        how = way | ({"order": random.Random(5)} if way["order"] == "random" else {})
        case = Case(scheme, 140, 40, 136, 16 if scheme == "ride_along" else 72, how=how)
        _, p = case.problems()
        forward = case.forward(p)
        backward = case.backward(p, forward["side"])
        found.append([forward["d"], forward["side"], backward["d"], backward["dr"], backward["db"]])
    assert not any(t.isnan().any() for t in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_launch_without_flags() -> None:
    """Riding along, a forward waits for nothing: items are numbers of CTAs, Q is not stored."""
    case = Case("ride_along", 20, 40, 40, 16)
    _, p = case.problems()
    right = case.forward(p)
    f = facts("ride_along", BF16, "forward")
    o = operands(
        f, x=p.x, w=p.weight, a=p.A, core=p.R.mT, b=p.B, bias=p.bias, scaling=case.scaling,
        store_side=False,
    )  # fmt: skip
    assert "flags" not in o.tensors
    done = execute(kernel_of(f), f, o)
    assert torch.equal(o["d"], right["d"]) and done.report.atomics == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("scheme", "rank"), [("ticket", 16), ("ticket", 64), ("ticket", 256)])
def test_flops_of_a_layer(scheme: str, rank: int, direction: str) -> None:
    """By the formula that the executed launches were held to: within 1.03 of what is needed."""
    f = facts(scheme, BF16, direction)
    m, size = 8192, 4096
    o = operands(
        f, x=torch.empty(m, size, dtype=BF16), w=torch.empty(size, size, dtype=BF16),
        a=torch.empty(rank, size, dtype=BF16), core=torch.empty(rank, rank),
        b=torch.empty(size, rank, dtype=BF16), scaling=1.0, need_dr=direction == "backward",
    )  # fmt: skip
    needed = 2 * m * (size * (size + 2 * rank) + rank**2 * (2 if direction == "backward" else 1))
    total = flops(Pass(f, o, None))  # type: ignore[arg-type]
    assert total.needed + total.again <= 1.03 * needed


@pytest.mark.parametrize("dtype", ELEMENTS, ids=ELEMENTS.get)
def test_the_library_says_the_same_of_its_kernels(dtype: torch.dtype) -> None:
    table = {k.name: k for k in plan.kernels()[1]}
    for scheme in SCHEMES:
        for direction in DIRECTIONS:
            f = facts(scheme, dtype, direction)
            for name in (field.name for field in fields(f)):
                assert getattr(table[f.name], name) == getattr(f, name), (f.name, name)
            assert table[f.name].aligned == (scheme != "unaligned")
            assert table[f.name].max_rank == (16 if scheme == "ride_along" else 256)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_matrix_instructions_and_wide_copies(direction: str) -> None:
    for scheme in SCHEMES:
        opcodes = {i.opcode for i in kernel_of(facts(scheme, BF16, direction)).instructions}
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in opcodes
        assert any(o.startswith("cp.async.cg.shared.global") for o in opcodes)
        assert any(o.startswith("ldmatrix") for o in opcodes)
        assert not any(".local" in o or o.startswith("call") for o in opcodes)
