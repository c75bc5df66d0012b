"""The few-row kernels, executed from the PTX of the built library.

What they compute, what it costs, and that it ends with the same bits whatever the order of the
CTAs. The interpreter raises at every race, access out of bounds, missing wait or deadlock, so each
test here is also a test of these.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton, whose wheel brings cuobjdump, is not installed")

from tests import oracle
from tests.cuda_device import require_library
from tests.cuda_few_rows import Case, again, facts, flops, least
from tests.cuda_layer import (
    BF16,
    DIRECTIONS,
    ELEMENTS,
    FP16,
    FP32,
    Pass,
    both,
    check_update,
    kernel_of,
    pitch,
)
from tests.cuda_ptx import Done, operands
from tools.cuda_resources import find

require_library()


def _gate(p: Pass) -> None:
    assert p.flops == flops(p)
    assert p.moved <= 1.15 * (least(p) + again(p))
    assert p.conflicts() == 0


VALUES = [
    Case(1, 136, 72, 16),
    Case(3, 520, 200, 20, FP16, FP16),
    Case(8, 264, 136, 12),
    Case(17, 264, 136, 64, FP16),
    Case(64, 136, 264, 144, BF16, BF16),
]
EVERY = [
    Case(rows, 552, 328, rank, dtype, core, parts)
    for rows, parts in ((1, 1), (3, 3), (8, 2), (16, 4), (17, 1), (33, 2), (64, 3))
    for rank in (4, 16, 20, 64, 136, 256)
    for dtype, core in ((BF16, FP32), (FP16, FP16))
]


def _name(case: Case) -> str:
    return f"{case.rows}x{case.k}x{case.n}-{case.rank}-{ELEMENTS[case.dtype]}"


@pytest.mark.parametrize(
    "case",
    [*VALUES, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in EVERY)],
    ids=_name,
)
def test_values_and_costs(case: Case) -> None:
    """Tails in M, N, K and rank; a bias; K in parts; R in fp32 and in the input's type."""
    both(case, _gate)


@pytest.mark.parametrize(
    "case",
    [
        Case(5, 67, 37, 5),
        *(
            pytest.param(Case(rows, 135, 91, rank, dtype), marks=pytest.mark.exhaustive)
            for rows in (1, 16, 31, 64)
            for rank in (3, 25, 70)
            for dtype in (BF16, FP16)
        ),
    ],
    ids=_name,
)
def test_rows_at_odd_addresses(case: Case) -> None:
    """Nothing is a multiple of anything; a scaling above one."""
    case.how["skew"] = {"x": 2, "w": 6, "a": 2, "b": 10, "d": 2, "side": 6, "q": 2, "bias": 2}
    case.views = {name: pitch(3) for name in ("x", "w", "a", "b", "g")}
    computed, forward, backward = case.run()
    oracle.check(computed)
    for p in (forward, backward):
        assert p.flops == flops(p)


def test_each_matrix_has_its_own_alignment() -> None:
    """A rank of 20 leaves B's rows unaligned; W is still read 16 bytes at a time."""
    case = Case(3, 136, 64, 20, parts=1)
    p = case.forward(case.problems()[1])
    wide = [line for line in p.done.report.lines.values() if "cp.async.cg" in line.text]
    assert sum(line.load_bytes for line in wide) >= 2 * (64 + 20) * 136
    assert {width for line in wide for width in line.widths} == {16}


@pytest.mark.parametrize("rank", [16, pytest.param(40, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("rows", "ids", "sort"),
    [
        (16, [3, -1, 7, 2, 2, 1 << 40, -5, 0, 1, 1, 1, 6, 8, 4, 3, 3], False),
        pytest.param(8, list(range(8)), False, marks=pytest.mark.exhaustive),
        (8, [7, 6, 5, -1, 3, 2, 1, 0], True),
        pytest.param(17, [-1] * 5 + [0] * 4 + [6] * 8, True, marks=pytest.mark.exhaustive),
        pytest.param(16, [-1] * 16, False, marks=pytest.mark.exhaustive),
        pytest.param(64, [n * 5 % 9 - 1 for n in range(64)], False, marks=pytest.mark.exhaustive),
    ],
    ids=["bad", "distinct", "distinct-sorted", "sorted", "none", "mixed"],
)
def test_a_core_per_row(rows: int, ids: list[int], sort: bool, rank: int) -> None:
    """Unsorted, sorted, all distinct, -1, out of range; adapters without rows get zeros."""
    case = Case(rows, 136, 72, rank, adapters=8, ids=torch.tensor(ids), sort=sort)
    for p in both(case, _gate):
        bad = any(i < -1 or i >= 8 for i in ids)
        assert sort or bool(p["bad_id"]) == bad
    for p in (case.forward(case.problems()[1]),):
        without = torch.tensor([i < 0 or i >= 8 for i in ids])
        assert not p["t"][without].any()


@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP16, marks=pytest.mark.exhaustive)])
def test_an_update_of_a_base(dtype: torch.dtype) -> None:
    """No W: D = base + s (Q R') B'^T; the base is read, not written, and has a pitch of its own."""
    check_update(Case(6, 136, 200, 24, dtype), _gate)


def test_dR_without_dX() -> None:
    case = Case(9, 72, 136, 24)
    (_, _, p), forward, whole = case.run()
    alone = case.backward(p, forward["side"], w=None, has_d=False, need_db=False)
    _gate(alone)
    assert torch.equal(alone["dr"], whole["dr"])
    assert "d" not in alone.operands.tensors and "db" not in alone.operands.tensors


@pytest.mark.parametrize("scaling", [3e4, -0.0])
def test_scaling(scaling: float) -> None:
    """One that would overflow T in fp16, where the product itself does not; and zero."""
    case = Case(3, 72, 64, 16, FP16, scaling=scaling)
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


@pytest.mark.parametrize(
    "rows", [3, pytest.param(20, marks=pytest.mark.exhaustive)], ids=lambda rows: f"{rows} rows"
)
def test_same_bits_in_any_order(rows: int) -> None:
    """CTAs one by one, two at a time, all; from the last to the first; at random."""
    ways: list[dict[str, Any]] = [
        {},
        {"residency": 1, "order": "reversed"},
        {"residency": 2, "order": random.Random(1)},
        {"order": random.Random(2)},
    ]
    found = []
    for how in ways:
        case = Case(rows, 520, 72, 24, parts=2, how=how)
        _, p = case.problems()
        forward = case.forward(p)
        backward = case.backward(p, forward["side"])
        found.append([forward["d"], forward["side"], backward["d"], backward["dr"], backward["db"]])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("rows", [8, pytest.param(64, marks=pytest.mark.exhaustive)])
def test_whole_tiles_waste_nothing(rows: int) -> None:
    """Nothing but the products that the formula has: 2 M (N K + r K + N r)."""
    m, k, n, r = rows, 256, 256, 32
    case = Case(m, k, n, r)
    _, p = case.problems()
    assert case.forward(p).flops == 2 * m * (n * k + r * k + n * r)


def test_w_is_read_once() -> None:
    """All bytes but those of X (once per tile) are within 1.15 of the least: executed, at M = 2,
    both passes."""
    case = Case(2, 512, 512, 16)
    _, p = case.problems()
    forward = case.forward(p)
    for done in (forward, case.backward(p, forward["side"])):
        _gate(done)
        x = again(done) - again(done, x=False)
        assert done.moved - x <= 1.15 * least(done)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("rows", "rank", "parts", "bound"),
    [(1, 16, 4, 1.01), (1, 64, 4, 1.02), (8, 64, 4, 1.06), (16, 64, 4, 1.10), (16, 256, 4, 1.15)],
)
def test_bytes_of_a_layer(rows: int, rank: int, parts: int, bound: float, direction: str) -> None:
    """By the formula that the executed launches were held to, at K = N = 4096."""
    f = facts(16, BF16, direction)
    size = 4096
    o = operands(
        f, x=torch.empty(rows, size, dtype=BF16), w=torch.empty(size, size, dtype=BF16),
        a=torch.empty(rank, size, dtype=BF16), core=torch.empty(rank, rank),
        b=torch.empty(size, rank, dtype=BF16), bias=torch.empty(size, dtype=BF16),
        scaling=1.0, parts=parts,
    )  # fmt: skip
    p = Pass(f, o, Done(report=None))  # type: ignore[arg-type]
    assert least(p) + again(p, x=False) <= bound * least(p)


def test_two_ctas_of_sixteen_rows_fit_an_sm() -> None:
    """In registers and in shared memory. (The other gates: test_cuda_resources.py.)"""
    for (name, _), used in find().items():
        if not name.startswith("loraxs_few_rows"):
            continue
        rows = 16 if "_16_" in name else 64
        f = facts(rows, BF16 if "bf16" in name else FP16, name.rsplit("_", 1)[1])
        assert f.name == name and f.shared <= 99 * 1024
        if rows == 16:
            assert 2 * (f.shared + 1024) <= 164 * 1024
            assert 2 * f.threads * used.registers <= 65536


def test_every_kernel_uses_matrix_instructions_and_wide_copies() -> None:
    for dtype, element in ELEMENTS.items():
        for direction in DIRECTIONS:
            for rows in (16, 64):
                kernel = kernel_of(facts(rows, dtype, direction))
                opcodes = {i.opcode for i in kernel.instructions}
                kind = "bf16" if element == "bf16" else "f16"
                product = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
                assert product in opcodes
                assert any(o.startswith("cp.async.cg.shared.global") for o in opcodes)
                assert not any(".local" in o for o in opcodes)
