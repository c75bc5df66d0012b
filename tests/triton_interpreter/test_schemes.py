"""Every scheme, both directions: values, edges, strides, numbers, determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import loraxs_kernels as lxk
from loraxs_kernels.backends.triton import launch
from loraxs_kernels.backends.triton.plan import RESIDENT, RIDE_ALONG, TICKET
from tests import oracle
from tests.triton_interpreter.common import SCHEMES, Case, small_plan

SIZES = [
    # rows, in, out, rank
    (1, 17, 3, 1),
    (20, 33, 40, 4),
    (17, 100, 33, 12),
    (3, 33, 65, 20),
    (70, 34, 40, 25),
    (33, 64, 64, 64),
    (20, 40, 40, 136),
    (110, 160, 300, 16),
]
KINDS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32-core": (torch.float16, torch.float32),
}


def _plan(scheme: str, rank: int, **changes: Any) -> Any:
    if scheme == "ride-along":
        changes["BR"] = max(16, 1 << (rank - 1).bit_length())
    return small_plan(SCHEMES[scheme], **changes)


#: All pairs would take minutes in the interpreter; these have every scheme, size and kind.
FAST = {
    ("ride-along", 1, "fp32"), ("ride-along", 1, "fp16"), ("ride-along", 4, "fp16-fp32-core"),
    ("ride-along", 12, "fp32"), ("ride-along", 20, "fp16"), ("ride-along", 25, "fp32"),
    ("ride-along", 16, "fp16"),
    ("resident", 1, "fp32"), ("resident", 4, "fp16"), ("resident", 12, "fp16-fp32-core"),
    ("resident", 20, "fp32"), ("resident", 25, "fp16"), ("resident", 136, "fp16-fp32-core"),
    ("ticket", 1, "fp16-fp32-core"), ("ticket", 4, "fp32"), ("ticket", 12, "fp16"),
    ("ticket", 20, "fp16-fp32-core"), ("ticket", 25, "fp32"), ("ticket", 64, "fp16"),
    ("ticket", 136, "fp32"), ("ticket", 16, "fp16-fp32-core"),
}  # fmt: skip
TRIPLES = [
    pytest.param(scheme, size, kind, id=f"{scheme}-{size}-{kind}",
                 marks=[] if (scheme, size[3], kind) in FAST else pytest.mark.slow)
    for scheme in SCHEMES for size in SIZES for kind in KINDS
    if scheme != "ride-along" or size[3] <= 64
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "size", "kind"), TRIPLES)
def test_values_and_gradients(scheme: str, size: tuple[int, int, int, int], kind: str) -> None:
    rows, k, n, rank = size
    dtype, core = KINDS[kind]
    changes = {"BM": 32, "BN": 64, "BK": 64} if rows > 100 else {}
    Case(rows, k, n, rank, dtype, core).check(_plan(scheme, rank, **changes))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(17, 33, 65, 12), (70, 100, 40, 25)], ids=str)
def test_through_the_public_function(scheme: str, shape: tuple[int, int, int, int]) -> None:
    p64 = oracle.problem(*shape)
    p = p64.to(torch.float32)
    W, A, B = oracle.frozen(p)
    plan = _plan(scheme, shape[-1])
    launch.plan_override = lambda problem, gpu: plan
    got = oracle.results(
        lambda x, R, b: lxk.lora_xs_linear(
            x, W, A, R, B, b, scaling=oracle.S, backend="triton"
        ),
        p,
    )  # fmt: skip
    oracle.check((got, p.to(torch.float64), p))


@pytest.mark.parametrize("parts", [2, 3])
def test_row_blocks_in_parts(parts: int) -> None:
    Case(37, 50, 200, 20).check(small_plan(RESIDENT, parts=parts))


@pytest.mark.parametrize("chunks", [1, 3, 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_core_gradient_in_chunks(scheme: str, chunks: int) -> None:
    Case(70, 33, 20, 20).check(_plan(scheme, 20, chunks=chunks))


def _padded_rows(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (0, 7), value=float("nan"))[:, : t.shape[1]]


def _column_major(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def _shifted(t: Tensor) -> Tensor:
    """At an odd address."""
    flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype)
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


VIEWS: dict[str, dict[str, Any]] = {
    "x in padded rows": {"x": _padded_rows, "grad_y": _padded_rows},
    "x transposed": {"x": _column_major, "grad_y": _column_major},
    "W transposed": {"weight": _column_major},
    "bases transposed": {"A": _column_major, "B": _column_major, "R": _column_major},
    "bases in padded rows": {"A": _padded_rows, "B": _padded_rows, "R": _padded_rows},
    "odd addresses": dict.fromkeys(("x", "weight", "A", "R", "B", "bias", "grad_y"), _shifted),
    "one row for all": {"grad_y": lambda t: t[:1].expand(t.shape)},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("views", VIEWS)
def test_strides(views: str, scheme: str) -> None:
    Case(20, 50, 40, 20, torch.float16, views=VIEWS[views]).check(_plan(scheme, 20))


@pytest.mark.parametrize("scheme", ["ride-along", "ticket"])
@pytest.mark.parametrize("scaling", [0.0, 1.0, -3.0, 250.0, 1e-6])
def test_scaling(scaling: float, scheme: str) -> None:
    Case(20, 40, 33, 12, torch.float16, torch.float32, scaling=scaling).check(_plan(scheme, 12))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_large_scaling_does_not_overflow(scheme: str) -> None:
    # T = Q R' is near 3e3, s T near 3e6: beyond float16, though s T B' is not.
    views = {"R": lambda t: 1000 * t, "B": lambda t: t / 1000}
    case = Case(20, 40, 33, 12, torch.float16, torch.float32, scaling=1000.0, views=views)
    assert case.check(_plan(scheme, 12))["y"].isfinite().all()


@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_what_is_needed(scheme: str, need: tuple[int, int, int]) -> None:
    wanted = (bool(need[0]), bool(need[1]), bool(need[2]))
    plan = _plan(scheme if need[0] else "ticket", 20)
    got = Case(37, 50, 70, 20, need=wanted).check(plan)
    assert [got[name].numel() > 0 for name in ("dx", "dR", "db")] == list(wanted)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("scheme", ["resident", "ticket", "ride-along"])
def test_update_of_a_base_output(scheme: str, p: float) -> None:
    if p and scheme == "ride-along":
        pytest.skip("dropout never rides along")
    Case(37, 50, 70, 20, update=True, dropout_p=p, need=(True, True, False)).check(
        _plan(scheme, 20)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["resident", "ticket"])
def test_dropout(scheme: str, dtype: torch.dtype) -> None:
    Case(37, 50, 70, 20, dtype, dropout_p=0.3).check(_plan(scheme, 20))
    Case(20, 64, 64, 16, dtype, dropout_p=0.9).check(_plan(scheme, 16))


@pytest.mark.parametrize("scheme", ["resident", "ticket"])
def test_dropout_of_a_block_of_columns(scheme: str) -> None:
    """Its mask is that of the wider matrix, also where the counters pass 2**32."""
    Case(37, 50, 70, 20, dropout_p=0.3, block=(64, 200)).check(_plan(scheme, 20))
    Case(37, 50, 70, 20, dropout_p=0.3, block=(2**33 - 1, 2**40)).check(_plan(scheme, 20))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(37, 48, 72, 16), (20, 40, 64, 12), (70, 104, 40, 24)], ids=str)
def test_tiles_by_descriptors(scheme: str, shape: tuple[int, int, int, int]) -> None:
    """A's rows, in the second shape's backward, do not start at multiples of 16 bytes."""
    Case(*shape, torch.float16, torch.float32).check(_plan(scheme, shape[-1], tma=True))


def test_descriptors_of_views() -> None:
    """Wider pitches and a transposed W can be described; rows at odd addresses cannot."""
    plan = _plan("ticket", 16, tma=True)
    wide = {name: lambda t: torch.nn.functional.pad(t, (0, 8), value=float("nan"))[:, : t.shape[1]]
            for name in ("x", "weight", "grad_y")}  # fmt: skip
    Case(20, 48, 40, 16, torch.float16, views=wide).check(plan)
    Case(20, 48, 40, 16, torch.float16, views={"weight": _column_major}).check(plan)
    with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
        Case(20, 48, 40, 16, torch.float16, views={"x": _shifted}).check(plan)


@pytest.mark.parametrize("shape", [(3, 100, 70, 25), (16, 64, 96, 16), (60, 128, 64, 40)], ids=str)
def test_few_rows(shape: tuple[int, int, int, int]) -> None:
    """The plan that the chooser makes, which streams W."""
    Case(*shape, torch.float16, torch.float32).check()


def test_the_choosers_plan_for_many_rows() -> None:
    Case(130, 128, 70, 20).check()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_core_gradient_is_the_same_every_time(scheme: str) -> None:
    """And with other tiles of D, which change the order in which row blocks are done."""
    case = Case(40, 33, 65, 20)
    first = case.check(_plan(scheme, 20))["dR"]
    other = case.check(_plan(scheme, 20, BN=16, GROUP_M=1))["dR"]
    assert torch.equal(first, other)


def test_an_unwritten_output_would_show() -> None:
    """The poison of conftest.py reaches the backend's outputs."""
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1).new_empty(3).isnan().all()


def test_empty_and_degenerate_calls() -> None:
    from loraxs_kernels.backends import triton as backend

    W, A, R, B = torch.ones(5, 4), torch.ones(2, 4), torch.ones(2, 2), torch.ones(5, 2)
    none = (None,) * 4
    y, q = backend.forward(torch.ones(0, 4), W, None, A, R, B, *none[:1], *none, 1.0, 0.0, 0)
    assert y.shape == (0, 5) and q.shape == (0, 2)
    _, dR, _ = backend.backward(y, q, W, A, R, B, *none, 1.0, 0.0, True, True, True, 0)
    assert torch.equal(dR, torch.zeros(2, 2))


def test_atomics_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAXS_ATOMIC_DR", "1")
    for scheme in (RIDE_ALONG, TICKET):
        Case(70, 33, 20, 20).check(small_plan(scheme, BR=32))
    assert launch.atomic_core_gradient()
    torch.use_deterministic_algorithms(True)
    try:
        assert not launch.atomic_core_gradient()
    finally:
        torch.use_deterministic_algorithms(False)
