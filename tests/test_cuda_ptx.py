"""The CUDA backend whole: both passes through the C++ host code and the PTX of the built library.

What each kernel computes and costs on its own is in the tests of its family; here the library is
what setup.py built, and a launch what the op ``prepare`` says. The interpreter raises at every
race, access out of bounds, missing wait or deadlock.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton, whose wheel brings cuobjdump, is not installed")

from loraxs_kernels.backends import cuda, flags, gpu, reference
from loraxs_kernels.backends.cuda import launch, plan
from tests import oracle
from tests.cuda_device import Device, Executed, install, named, require_library
from tests.triton_interpreter.common import Case

require_library()

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ELEMENTS = {BF16: "bf16", FP16: "fp16"}
TABLE = {k.name: k for k in plan.kernels()[1]}
WRITTEN = ("d", "side", "dr", "db")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    flags._by_stream.clear()
    yield install(monkeypatch, Device())
    for held in flags._by_stream.values():
        assert not held.any(), "a launch left flags behind"


def _kernel(scheme: str, dtype: torch.dtype) -> str:
    """A kernel's name, with DIRECTION for the pass's; skips where it is not built."""
    name = f"loraxs_{scheme}_{ELEMENTS[dtype]}_DIRECTION"
    if name.replace("DIRECTION", "forward") not in TABLE:
        pytest.skip(f"the library is built for {' '.join(plan.kernels()[0])}, without {scheme}")
    return name


def _written_once(e: Executed) -> None:
    rank = int(e.fields["rank"])
    for name in WRITTEN:
        if name in e.tensors:
            counts = e.done.buffers[name].write_counts
            # The rows of a scratch P are padded to whole vectors.
            assert ((counts[:, :rank] if name == "side" else counts) == 1).all(), name
            assert e.done.buffers[name].stray_writes == 0, name


def _check(device: Device, case: Case, scheme: str, **cut: int) -> dict[str, Tensor]:
    """Both passes, one launch each, beside the definition by the rule of tests/oracle.py."""
    device.arch = 90 if scheme.startswith("sm90") else 80
    launch.plan_override = named(_kernel(scheme, case.dtype), **cut)
    before, done = launch.launches, len(device.runs)
    got = case.run(cuda, None, None)
    assert launch.launches - before == 2 == len(device.runs) - done, "one launch in each direction"
    truth = case.run(reference, torch.float64, None)
    peer = case.run(reference, None, None)
    for name, value in got.items():
        assert value.dtype == peer[name].dtype and value.shape == truth[name].shape, name
        if value.numel():
            eps = 2 * torch.finfo(value.dtype).eps
            oracle.rule(name, truth[name], value.double(), [peer[name].double()], eps)
    for e in device.runs[done:]:
        assert e.done.report.launches == 1
        _written_once(e)
    return got


FEW = ("few_rows_16", "few_rows_64")
SCHEMES = ("sm80_ride_along", "sm80_ticket", "sm80_unaligned", *FEW, "sm90_cluster_64")
RANKS = {"sm80_ride_along": 12, "sm90_cluster_64": 24}
ROWS = {"few_rows_16": 13, "few_rows_64": 50}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values(device: Device, scheme: str, dtype: torch.dtype) -> None:
    """Tails in every size; bias; dR with a float32 R (bf16) or one of the input's type (fp16)."""
    core = FP32 if dtype == BF16 else FP16
    case = Case(ROWS.get(scheme, 100), 72, 88, RANKS.get(scheme, 40), dtype, core)
    _check(device, case, scheme, chunks=1 if scheme in FEW else 2, group=2)


@pytest.mark.parametrize("scheme", ["sm80_unaligned", *FEW])
def test_rows_at_odd_addresses(device: Device, scheme: str) -> None:
    """Nothing is a multiple of anything; a scaling above one."""
    case = Case(ROWS.get(scheme, 70), 37, 67, 20, BF16, FP32, scaling=3.0)
    _check(device, case, scheme)


@pytest.mark.parametrize("scheme", ["sm80_ticket", *FEW])
@pytest.mark.parametrize("sort", [False, True], ids=["ids", "sorted"])
def test_a_core_per_row(device: Device, scheme: str, sort: bool) -> None:
    rows = ROWS.get(scheme, 40)
    case = Case(rows, 40, 72, 12, BF16, FP32, adapters=3, sort=sort, need=(True, True, False))
    _check(device, case, scheme)


def test_ids_out_of_range(device: Device) -> None:
    """Such a row has no adapter, is reported at the next call, and no core is read for it."""
    case = Case(40, 40, 72, 12, BF16, FP32, adapters=3, need=(True, True, False))
    case.tensors()
    assert case.ids is not None
    case.ids[5] = -1
    right = _check(device, case, "sm80_ticket")
    case.ids = case.ids.clone()
    case.ids[5] = 5_000_000_000
    with pytest.raises(ValueError, match="adapter_ids"):
        case.run(cuda, None, None)  # the backward tells what the forward met
    assert torch.equal(device.runs[-1].tensors["d"], right["y"])


@pytest.mark.parametrize("scheme", ["sm80_ticket", "few_rows_64", "sm90_cluster_64"])
def test_update_of_a_base_output(device: Device, scheme: str) -> None:
    case = Case(ROWS.get(scheme, 70), 40, 72, 16, BF16, FP32, update=True, need=(True, True, False))
    _check(device, case, scheme)


@pytest.mark.parametrize("scheme", ["sm80_ticket", "few_rows_64"])
def test_without_dx(device: Device, scheme: str) -> None:
    case = Case(ROWS.get(scheme, 70), 40, 72, 16, BF16, FP32, need=(False, True, True))
    got = _check(device, case, scheme)
    assert got["dx"].numel() == 0 and "d" not in device.runs[-1].tensors


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_order_of_ctas_gives_the_same_bits(device: Device, scheme: str) -> None:
    """And ends, with one CTA (cluster) resident, two, or all."""
    cluster = 4 if scheme.startswith("sm90") else 1
    rows = ROWS.get(scheme, 140)
    cut = {"parts": 1} if scheme not in FEW else {"parts": 1, "chunks": 1}
    case = Case(rows, 136, 72, RANKS.get(scheme, 24), BF16, FP32)
    found: list[dict[str, Tensor]] = []
    for order, residency in (("linear", 1), ("reversed", 2), ("random", None)):
        device.order = random.Random(5) if order == "random" else order
        device.residency = residency and residency * cluster
        found.append(_check(device, case, scheme, **cut))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_parts_of_k(device: Device) -> None:
    """Few rows: a tile's K, and Q's, are shared by CTAs. Their order changes no bit."""
    case = Case(3, 1100, 600, 24, BF16, FP32)
    first = _check(device, case, "few_rows_16", parts=2)
    device.order, device.residency = "reversed", 2
    second = _check(device, case, "few_rows_16", parts=2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    forward = device.runs[0]
    assert forward.fields["parts"] == 2 and forward.fields["slice_parts"] == 3
    assert "partial" in forward.tensors


def test_the_plan_that_is_chosen(device: Device) -> None:
    """Nothing is overridden: the backend's own choice for the operands."""
    for rows, family in ((5, "few-rows"), (70, "ticket")):
        case = Case(rows, 72, 88, 40, BF16, FP32)
        got = case.run(cuda, None, None)
        assert TABLE[device.runs[-1].name].family == family
        want = case.run(reference, torch.float64, None)
        assert torch.allclose(got["y"].double(), want["y"], rtol=0.05, atol=0.05)


def test_a_call_that_names_no_backend(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is chosen once for each kind of pass. (By arithmetic this layer is too small for them.)"""
    monkeypatch.setattr(gpu.triton_plan, "cost", lambda *a: float("inf"))
    gpu._chosen.clear()
    case = Case(5, 72, 88, 40, BF16, FP32)
    for _ in range(2):
        got = case.run(gpu, None, None)
    assert len(device.runs) == 4 and len(gpu._chosen) == 2
    launch.plan_override = None
    want = case.run(cuda, None, None)
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_tuning_lets_both_backends_race(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The winner runs, and is remembered in the file; the others of the race are Triton's plans,
    and library products."""
    from loraxs_kernels.backends.triton import autotune
    from loraxs_kernels.backends.triton import launch as triton_launch

    seen: list[Any] = []

    def race(runners: Any, time: Any) -> Any:
        seen.extend(runners)
        return next(p for p in runners if isinstance(p, plan.Plan) and p.group == 16)

    two_step = {autotune.TWO_STEP: lambda: None}
    monkeypatch.setenv("LORAXS_AUTOTUNE_CACHE", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(autotune, "_winners", None)
    monkeypatch.setattr(autotune, "measuring", lambda: True)
    monkeypatch.setattr(autotune, "race", race)
    monkeypatch.setattr(triton_launch, "contenders", lambda o, gpu, problem: dict(two_step))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (gpu, launch):
        monkeypatch.setattr(module, "software", lambda device: "a GPU")
    case = Case(5, 72, 88, 40, BF16, FP32)
    for module, others in ((gpu, {autotune.TWO_STEP}), (cuda, set())):
        gpu._chosen.clear()
        seen.clear()
        case.run(module, None, None)
        assert {p for p in seen if not isinstance(p, plan.Plan)} == others
        assert all(e.fields["group"] == 16 for e in device.runs[-2:])
    monkeypatch.setattr(autotune, "_winners", None)
    stored = autotune.winners()
    assert len(stored) == 4 and all(isinstance(w, plan.Plan) for w in stored.values())
    gpu._chosen.clear()


def test_a_repeated_call_is_prepared_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Any] = []
    inner = launch.prepare

    def prepare(o: Any, chosen: Any) -> Any:
        prepared.append(chosen)
        return inner(o, chosen)

    monkeypatch.setattr(launch, "prepare", prepare)
    case = Case(5, 40, 72, 16, BF16, FP32)
    for _ in range(2):
        case.run(cuda, None, None)
    assert len(prepared) == 2 and len(device.runs) == 4


def test_an_input_that_is_copied(device: Device) -> None:
    """Columns that are contiguous, and rows that are all one."""
    for view in (lambda t: t.T.contiguous().T, lambda t: t[:1].expand_as(t)):
        case = Case(20, 40, 72, 16, BF16, FP32, views={"x": view, "grad_y": view})
        _check(device, case, "sm80_ticket")
