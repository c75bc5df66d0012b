"""The GPU side of ``bench/``: all of it that can run where there is no GPU."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from bench import (
    bench_linear,
    bench_multi,
    gpu_cases,
    gpu_linear,
    gpu_timing,
    multi_cases,
    popularity,
    profiling,
    roofline,
)
from bench.linear_cases import Case, Operands, Step, Weights, check_agreement, check_equal
from bench.multi_cases import MultiCase
from bench.roofline import Chip

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
CHIP = Chip(bandwidth=2e12, flops=4e14)


@dataclass
class FakeGpu:
    """Runs on the CPU, by a clock that only its own work moves; remembers the order of events."""

    device: str = "cpu"
    l2_bytes: int = 1024
    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def evict(self) -> None:
        self.log.append("evict")
        self.now += 100.0

    def stamp(self) -> float:
        self.log.append("stamp")
        return self.now

    def wait(self) -> None:
        self.log.append("wait")

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def replay(self, name: str, cost: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += cost

        return run

    def graph(self, step: Step, x: Tensor, grad_y: Tensor) -> Callable[[], Any]:
        def run() -> Any:
            self.now += 1e-3
            return step(x, grad_y)

        run()
        return run

    def line(self) -> str:
        return "a fake GPU"


# ------------------------------------------------------------------------------------- timing


def test_interleaved_evicts_rotates_and_waits() -> None:
    gpu = FakeGpu()
    replays = {
        n: [gpu.replay(f"{n}{i}", cost) for i in range(2)] for n, cost in (("a", 2), ("b", 5))
    }
    timings = gpu_timing.interleaved(replays, gpu, budget_s=0.0, min_rounds=4)
    assert {n: (t.median, t.samples) for n, t in timings.items()} == {"a": (2, 4), "b": (5, 4)}
    # The round that sets the number of rounds, between two stamps of its own, comes first.
    work = gpu.log[gpu.log.index("wait") + 1 :]
    order = [event for event in work if event not in ("evict", "stamp", "wait")]
    assert order == ["a0", "b0", "b1", "a1", "a0", "b0", "b1", "a1"]
    for i, event in enumerate(work):
        if event in order:
            assert work[i - 2 : i + 2] == ["evict", "stamp", event, "stamp"]
    assert work.count("wait") == 4


@pytest.mark.parametrize(
    ("budget", "rounds"), [(0.0, 3), (107.0 * 7, 7), (math.inf, 9)], ids=["least", "fits", "most"]
)
def test_rounds_follow_the_budget(budget: float, rounds: int) -> None:
    gpu = FakeGpu()
    timings = gpu_timing.interleaved(
        {"a": [gpu.replay("a", 7)]}, gpu, budget_s=min(budget, 1e9), min_rounds=3, max_rounds=9
    )
    assert timings["a"].samples == rounds
    assert gpu_timing.interleaved({}, gpu) == {}


def test_flush_and_copies_exceed_the_cache() -> None:
    for l2 in (1 << 20, 50 << 20, 126 << 20):
        assert gpu_timing.flush_bytes(l2) >= max(4 * l2, 256 << 20)
    assert gpu_timing.copies(50 << 20, 50 << 20) == 4
    assert gpu_timing.copies(100 << 20, 50 << 20) == 2
    assert gpu_timing.copies(1 << 40, 50 << 20) == 1
    assert gpu_timing.copies(0, 50 << 20) == 4


def test_input_sets_have_addresses_of_their_own() -> None:
    x, g = torch.randn(3, 4), torch.randn(3, 5)
    sets = gpu_timing.input_sets(x, g, 3, trains=True)
    assert len({t.data_ptr() for pair in sets for t in (*pair, x, g)}) == 8
    for x_i, g_i in sets:
        assert torch.equal(x_i, x) and torch.equal(g_i, g)
        assert x_i.requires_grad and x_i.is_leaf and not g_i.requires_grad


def test_capture_needs_ours_and_names_what_fails() -> None:
    def fails(x: Tensor, grad_y: Tensor) -> Tensor:
        raise RuntimeError("out of paper\nand more")

    x = torch.ones(1)
    steps: dict[str, Step] = {"ours": lambda x, g: x + g, "peer": fails}
    graphs, skipped = gpu_timing.capture(steps, [(x, x), (x, 2 * x)], FakeGpu())
    assert [float(graph()) for graph in graphs["ours"]] == [2, 3]
    assert skipped == {"peer": "RuntimeError: out of paper"} and "peer" not in graphs
    with pytest.raises(RuntimeError, match="ours could not be captured: out of paper"):
        gpu_timing.capture({"ours": fails}, [(x, x)], FakeGpu())


def test_a_case_that_does_not_fit_is_left_out_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(gpu_timing, "PEAK_SIZE", 16)
    monkeypatch.setattr(gpu_timing, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(gpu_linear, "contenders", lambda *_, **__: ({"ours": full}, {}))
    case = Case(32, 48, 8, 4, "fp32", "fwd")
    options: dict[str, Any] = {"budget_s": 0.0, "minutes": 1.0}
    assert not gpu_linear.run([case], FakeGpu(), compile_="none", out=tmp_path, **options)
    monkeypatch.setattr(bench_multi, "MultiOperands", full)
    assert not bench_multi.run([MultiCase(case, 8, "zipf", "sorted")], FakeGpu(), **options)
    assert capsys.readouterr().out.count("left out: out of memory") == 2


def test_agreement_is_relative_and_refuses_nan() -> None:
    want = 1e6 * torch.randn(5000, 3)
    check_equal("a peer", [want * 1.001], [want], tolerance=1.1e-3)
    for got in (want * 1.002, torch.where(want == want[4999, 2], math.nan, want)):
        with pytest.raises(RuntimeError, match="a peer differs from eager"):
            check_equal("a peer", [got], [want], tolerance=1.1e-3)


def test_graph_warms_up_and_captures_on_one_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls, with a stand-in for ``torch.cuda``."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Recorder:
        def replay(self) -> None:
            log.append("replay")

    @contextlib.contextmanager
    def within(what: Any, stream: Stream | None = None) -> Any:
        log.append(f"begin {'capture on ' + stream.name if stream else what.name}")
        yield
        log.append("end")

    fakes: dict[str, Any] = {
        "Stream": Stream, "CUDAGraph": Recorder, "graph": within, "stream": within,
        "current_stream": lambda: Stream("main"), "synchronize": lambda: log.append("wait"),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def step(x: Tensor, grad_y: Tensor) -> Tensor:
        log.append("step")
        return x + grad_y

    graph = gpu_timing.Graph(step, torch.ones(1), torch.ones(1))
    assert log == [
        "side waits for main", "begin side", "step", "step", "step", "end", "main waits for side",
        "wait", "begin capture on side", "step", "end",
    ]  # fmt: skip
    assert float(graph()) == 2 and log[-2:] == ["end", "replay"]


def test_precision_is_a_matter_of_the_dtype() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for dtype, expected in (("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")):
            gpu_timing.set_precision(dtype)
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------- cases


def test_default_cases_cover_what_was_asked() -> None:
    cases = gpu_cases.select()
    assert len(cases) == len(set(cases)) > 100
    assert {c.rows for c in cases} == {1, 16, 64, 256, 1024, 4096, 16384}
    assert {c.rank for c in cases} == {16, 64, 128, 256}
    assert {c.what for c in cases} == {"fwd", "fwdbwd"} and {c.dtype for c in cases} == {"bf16"}
    for shape in ((4096, 14336), (14336, 4096), (1024, 4096), (576, 1536), (2048, 8192)):
        assert any(c.shape == shape for c in cases)


def test_asked_cases_are_all_there() -> None:
    cases = gpu_cases.select([(64, 128)], [16, 256], [3], ["tf32"], ["fwd"])
    assert cases == [Case(64, 128, 3, 16, "tf32", "fwd")]
    every_shape = gpu_cases.select(None, None, [16384], None, ["fwd"])
    assert [c.shape for c in every_shape] == gpu_cases.default_shapes()


@pytest.mark.parametrize("what", ["fwd", "fwdbwd"])
@pytest.mark.parametrize(("bias", "dtype"), [(True, "fp32"), (False, "fp32"), (True, "bf16")])
def test_gpu_contenders_agree(what: str, bias: bool, dtype: str) -> None:
    """On CPU tensors: above all that the joined products of two-step are the layer's."""
    case = Case(48, 80, 7, 8, dtype, what)
    weights = Weights(case.shape, dtype)
    if not bias:
        weights.linear.register_parameter("bias", None)
    with torch.set_grad_enabled(case.trains):
        ops = Operands(case, weights.linear)
        steps, skipped = gpu_cases.contenders(case, ops, with_compile=False)
        [(x, g)] = gpu_timing.input_sets(ops.x, ops.grad_y, 1, trains=case.trains)
        calls = {n: (lambda s=s: s(x, g)) for n, s in steps.items()}
        check_agreement(case, calls)
        bare = [calls[n]() for n in ("bare linear", "bare addmm")]
    assert "two-step" in calls
    named = {f"ours {name}" for name in gpu_cases.NAMED_BACKENDS}
    assert all(name in calls or skipped[name] for name in named)
    for a, b in zip(*(r if case.trains else [r] for r in bare), strict=True):
        torch.testing.assert_close(a, b)


def test_two_step_obeys_scaling_and_launches_few() -> None:
    case = Case(32, 48, 5, 4, "fp32", "fwdbwd")
    ops = Operands(case, Weights(case.shape, "fp32").linear)
    x, g, R = ops.x, ops.grad_y, ops.R
    dx, dR = gpu_cases.two_step(case, ops, scaling=0.3)(x, g)
    W = ops.linear.weight
    torch.testing.assert_close(dx, g @ W + 0.3 * (g @ ops.B @ R @ ops.A))
    torch.testing.assert_close(dR, 0.3 * (g @ ops.B).T @ (x @ ops.A.T))
    products = _products(lambda: gpu_cases.two_step(case, ops)(x, g))
    assert products == 7


def _products(call: Callable[[], object]) -> int:
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    names = ("aten::mm", "aten::addmm", "aten::addmm_")
    return sum(e.count for e in profiler.key_averages() if e.key in names)


# ------------------------------------------------------------------------------------- roofline


def test_roofline_by_hand() -> None:
    case = Case(100, 200, 10, 4, "bf16", "fwd")
    # e (MK + NK + rK + rN + MN) + 4 r²; 2 M (KN + r (K + N) + r²)
    assert roofline.fused(case) == [
        roofline.Kernel("forward", 2 * (1000 + 20000 + 400 + 800 + 2000) + 64, 424320)
    ]
    train = Case(100, 200, 10, 4, "fp32", "fwdbwd")
    forward, backward = roofline.fused(train)
    assert forward.bytes == 4 * (1000 + 20000 + 400 + 800 + 2000 + 40) + 64
    assert backward.bytes == 4 * (2000 + 20000 + 400 + 800 + 40 + 1000) + 128
    assert forward.flops + backward.flops == pytest.approx(train.flops)
    assert [k.bytes for k in roofline.bare(train)] == [4 * 23000] * 2
    assert [k.flops for k in roofline.bare(train)] == [400000] * 2


def test_roofline_counts_cores_and_factors() -> None:
    case = Case(100, 200, 10, 4, "bf16", "fwdbwd")
    one = roofline.fused(case)
    many = roofline.fused(case, distinct=3, adapters=9, ids=True)
    assert many[0].bytes - one[0].bytes == 2 * 64 + 80
    assert many[1].bytes - one[1].bytes == 2 * 64 + 8 * 64 + 80
    lora = roofline.ordinary_lora(case, distinct=3, adapters=9)
    assert lora[0].bytes == 2 * (1000 + 20000 + 2000) + 3 * 2400 + 2 * 40 + 80
    assert lora[1].bytes == 2 * (1000 + 20000 + 2000) + 2 * 10 * 104 + 12 * 2400 + 80


def test_roofline_seconds_take_the_slower_side() -> None:
    memory, flops = roofline.Kernel("m", 4e12, 1e12), roofline.Kernel("f", 1e12, 8e14)
    assert memory.seconds(CHIP, "bf16") == 2.0 and memory.is_memory_bound(CHIP, "bf16")
    assert flops.seconds(CHIP, "bf16") == 2.0 and not flops.is_memory_bound(CHIP, "bf16")
    assert flops.seconds(CHIP, "tf32") == 4.0
    assert roofline.seconds([memory, flops], CHIP, "bf16") == 4.0
    # eager: the same products, and what it writes and reads between them
    case = Case(64, 64, 8, 4, "bf16", "fwdbwd")
    eager = roofline.eager(case)
    assert sum(k.flops for k in eager) == pytest.approx(case.flops)
    assert sum(k.bytes for k in eager) > roofline.minimum_bytes(case)


# ------------------------------------------------------------------------------------- popularity


@pytest.mark.parametrize("order", popularity.ORDERS)
@pytest.mark.parametrize("kind", popularity.KINDS)
@pytest.mark.parametrize(("rows", "adapters"), [(1, 1), (1, 64), (96, 8), (40, 1024)])
def test_popularity(kind: str, order: str, rows: int, adapters: int) -> None:
    ids = popularity.draw(kind, order, rows, adapters)
    assert ids.dtype == torch.int64 and ids.shape == (rows,)
    assert int(ids.min()) >= -1 and int(ids.max()) < adapters
    assert torch.equal(ids, popularity.draw(kind, order, rows, adapters))
    other = popularity.draw(kind, "sorted", rows, adapters)
    assert torch.equal(ids.sort().values, other)
    if order == "sorted":
        assert torch.equal(ids, other)
    base = int((ids < 0).sum())
    assert base == (max(1, rows // 4) if kind == "base" else 0)
    present = multi_cases.distinct_adapters(ids)
    if kind == "identical":
        assert present == 1
    if kind == "distinct":
        assert present == min(rows, adapters)
        counts = torch.bincount(ids, minlength=adapters)
        assert int(counts.max() - counts.min()) <= 1


def test_popularity_differs_in_kind_and_seed() -> None:
    def counts(kind: str) -> Tensor:
        return torch.bincount(popularity.draw(kind, "shuffled", 4096, 64), minlength=64)

    # zipf with exponent 1.5: the first of 64 holds 1 / 2.4 of the rows; uniform: 1 / 64.
    assert 0.35 < float(counts("zipf").max()) / 4096 < 0.50
    assert float(counts("uniform").max()) / 4096 < 0.03
    shuffled = popularity.draw("uniform", "shuffled", 64, 64)
    assert not torch.equal(shuffled, shuffled.sort().values)
    assert not torch.equal(shuffled, popularity.draw("uniform", "shuffled", 64, 64, seed=1))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("odd", "sorted", 1, 1), "kind"), (("zipf", "up", 1, 1), "order"),
     (("zipf", "sorted", 0, 1), "rows"), (("zipf", "sorted", 1, 0), "adapters")],
)  # fmt: skip
def test_popularity_refuses(arguments: tuple[str, str, int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        popularity.draw(*arguments)


def test_multi_cases_run_the_same_ids_once() -> None:
    cases = multi_cases.select(
        [(64, 64)], [4], [1, 24], [1, 8], popularity.KINDS, popularity.ORDERS, ["fp32"], ["fwd"]
    )
    seen = [(c.layer, c.adapters, tuple(c.ids.tolist())) for c in cases]
    assert len(seen) == len(set(seen))
    one = [c for c in cases if c.adapters == 1]
    assert len([c for c in one if c.layer.rows == 1]) == 2  # the adapter, or none
    assert {c.popularity for c in cases if c.adapters == 8 and c.layer.rows == 24} == set(
        popularity.KINDS
    )
    for device in ("cpu", "cuda"):
        default = multi_cases.default_cases(device)
        assert {c.adapters for c in default} == {1, 8, 64, 1024}
        assert {c.layer.rows for c in default} == {1, 16, 128, 1024, 4096}
        assert {c.popularity for c in default} == set(popularity.KINDS)


@pytest.mark.parametrize("what", ["fwd", "fwdbwd"])
@pytest.mark.parametrize("kind", popularity.KINDS)
def test_multi_contenders_agree(what: str, kind: str) -> None:
    case = MultiCase(Case(40, 56, 12, 4, "fp32", what), 8, kind, "shuffled")
    weights = Weights(case.layer.shape, "fp32")
    with torch.set_grad_enabled(case.layer.trains):
        ops = multi_cases.MultiOperands(case, weights, "cpu")
        found, skipped = multi_cases.contenders(case, ops, weights)
        [(x, g)] = gpu_timing.input_sets(ops.x, ops.grad_y, 1, trains=case.layer.trains)
        calls: dict[str, Callable[[], Any]] = {
            n: functools.partial(c.step, x, g) for n, c in found.items()
        }
        multi_cases.check_agreement(case, found, calls)
        for name in ("ours", "loop", "lora segments"):
            off = dict(calls)
            off[name] = functools.partial(_scaled, calls[name], 1.01)
            with pytest.raises(RuntimeError, match=f"{name} differs"):
                multi_cases.check_agreement(case, found, off)
    assert not skipped


def _scaled(call: Callable[[], Any], factor: float) -> Any:
    result = call()
    return result * factor if isinstance(result, Tensor) else [t * factor for t in result]


def test_ordinary_lora_is_left_out_where_it_needs_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    case = MultiCase(Case(40, 56, 12, 4, "fp32", "fwd"), 8, "uniform", "sorted")
    weights = Weights(case.layer.shape, "fp32")
    monkeypatch.setattr(multi_cases, "LORA_LIMIT", 1000)
    with torch.no_grad():
        ops = multi_cases.MultiOperands(case, weights, "cpu")
        found, skipped = multi_cases.contenders(case, ops, weights)
    assert set(skipped) == {"lora gather", "lora segments"} and not set(skipped) & set(found)


# ------------------------------------------------------------------------------- whole programs


def test_bench_multi_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--shapes 32x48 --ranks 4 --rows 16 --adapters 8 --popularity zipf,base"
    options = ["--case-seconds", "0.001", "--device", "cpu", "--out", str(tmp_path)]
    bench_multi.main([*sizes.split(), *options])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "multi.json").read_text())
    assert written["modelled"] is False and "modelled" not in printed
    results = written["results"]
    assert printed.count("\n32→48") == len(results) == 8
    assert {r["what"] for r in results} == {"fwd", "fwdbwd"}
    for result in results:
        assert set(result["speedup_over"]) == {"raw ids", "single", "loop", "bmm", "LoRA"}
        assert result["us"] > 0 and not result["skipped"]
    assert "geometric means" in printed


def test_bench_multi_quick_cases() -> None:
    cases = multi_cases.quick_cases("cpu")
    assert {c.layer.what for c in cases} == {"fwd", "fwdbwd"}
    assert max(c.adapters for c in cases) == 1024 and "base" in {c.popularity for c in cases}


def test_the_gpu_program_on_a_fake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of ``gpu_linear.run``, with a clock that is not one."""
    monkeypatch.setattr(gpu_timing, "PEAK_SIZE", 16)
    monkeypatch.setattr(gpu_timing, "COPY_BYTES", 1 << 20)
    cases = [Case(32, 48, 8, 4, "fp32", what) for what in ("fwd", "fwdbwd")]
    gpu = FakeGpu()
    results = gpu_linear.run(cases, gpu, compile_="none", budget_s=0.0, minutes=1.0, out=tmp_path)
    printed = capsys.readouterr().out
    assert [r.case for r in results] == cases
    for result in results:
        # The fake's clock gives every pass the same millisecond.
        assert result.ours == pytest.approx(1e-3) and result.over_bare == pytest.approx(1.0)
        assert result.flops == pytest.approx(result.case.flops * 1e3)
        assert result.bandwidth == pytest.approx(roofline.minimum_bytes(result.case) * 1e3)
        assert {"eager", "two-step", "bare linear", "bare addmm"} <= set(result.timings)
    assert "measured: cuBLAS 16×16×16" in printed and "modelled" not in printed
    written = json.loads((tmp_path / "linear-gpu.json").read_text())
    assert written["gpu"] == "a fake GPU" and len(written["results"]) == 2
    assert written["peak_flops"]["fp32"] == pytest.approx(2 * 16**3 * 1e3)


def test_the_multi_program_on_a_fake() -> None:
    case = MultiCase(Case(32, 48, 8, 4, "fp32", "fwdbwd"), 8, "base", "shuffled")
    [result] = bench_multi.run([case], FakeGpu(), budget_s=0.0, minutes=1.0)
    assert {"ours", "ours raw ids", "single", "loop", "bmm", "lora gather"} <= set(result.timings)


@no_gpu
@pytest.mark.parametrize(
    ("program", "name"), [(bench_linear, "linear"), (bench_multi, "multi")], ids=["linear", "multi"]
)
def test_without_a_gpu_everything_is_modelled(
    program: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assumed = ["--model-bandwidth", "2", "--model-tflops", "400"]
    program.main(["--device", "cuda", "--quick", *assumed, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "no CUDA device" in printed and "MODELLED" in printed
    assert "modelled s = sum over kernels of max(bytes / bandwidth, FLOPs / peak)" in printed
    assert "assumed, not measured: 2 TB/s" in printed and "400 TFLOP/s" in printed
    heading = next(line for line in printed.splitlines() if line.startswith("shape (in→out)"))
    inputs = {"shape (in→out)", "M", "r", "dtype", "pass", "adapters", "present", "popularity",
              "row order", "flop tax"}  # fmt: skip
    columns = [column.strip() for column in heading.split("|")]
    assert all(column in inputs or column.startswith("modelled") for column in columns)
    assert "modelled µs" in columns
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}-gpu-modelled.json"]
    assert json.loads((tmp_path / f"{name}-gpu-modelled.json").read_text())["modelled"] is True


@no_gpu
def test_modelled_numbers_by_hand(tmp_path: Path) -> None:
    sizes = "--device cuda --shapes 4096x4096 --rows 8192 --ranks 16 --passes fwd"
    bench_linear.main([*sizes.split(), "--out", str(tmp_path)])
    [line] = json.loads((tmp_path / "linear-gpu-modelled.json").read_text())["results"]
    flops = 2 * 8192 * (4096**2 + 16 * 8192 + 256)
    assert line["modelled limit"] == "FLOPs"
    assert float(line["modelled µs"]) == pytest.approx(flops / 700e12 * 1e6, abs=0.06)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast"])
def test_model_options_are_checked(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_linear.main([f"--model-bandwidth={value}"])
    assert "--model-bandwidth" in capsys.readouterr().err


@pytest.mark.parametrize("program", [bench_linear, bench_multi])
def test_a_cpu_has_no_tf32(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--device", "cpu", "--dtypes", "tf32"])
    assert "tf32" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- profiling


@dataclass
class _Range:
    us: float

    def elapsed_us(self) -> float:
        return self.us


@dataclass
class _Event:
    name: str
    us: float
    device_type: DeviceType = DeviceType.CUDA
    is_user_annotation: bool = False

    @property
    def time_range(self) -> _Range:
        return _Range(self.us)


def test_launches_are_counted_per_pass() -> None:
    events = [
        *[_Event("gemm", 10.0)] * 4, *[_Event("add", 3.0)] * 2, *[_Event("Memset (Device)", 1)] * 2,
        _Event("aten::mm", 99.0, DeviceType.CPU), _Event("step", 99.0, is_user_annotation=True),
    ]  # fmt: skip
    table = profiling.launches(events, passes=2)
    assert [(k.name, k.count, k.us) for k in table] == [
        ("gemm", 2, 20), ("add", 1, 3), ("Memset (Device)", 1, 1),
    ]  # fmt: skip
    assert "3 kernel launches per pass, 23.0 µs" in profiling.launches_text(table)[0]


def test_profile_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--shapes 32x48 --ranks 4 --rows 8 --dtypes fp32 --passes fwdbwd --profile"
    bench_linear.main([*sizes.split(), "--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "a CPU has no kernel launches" in printed and "aten::addmm" in printed
    for name in ("ours", "eager", "bare-plain"):
        trace = json.loads((tmp_path / f"trace-32x48-m8-r4-fp32-fwdbwd-{name}.json").read_text())
        assert trace["traceEvents"]


# ------------------------------------------------------------------------------------- with a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(
    ("program", "sizes", "name"),
    [
        (bench_linear, "--shapes 512x768 --ranks 16 --rows 64 --compile none", "linear-gpu"),
        (bench_multi, "--shapes 512x768 --ranks 16 --rows 64 --adapters 8", "multi-gpu"),
    ],
    ids=["linear", "multi"],
)
def test_on_a_gpu(program: Any, sizes: str, name: str, tmp_path: Path) -> None:
    program.main([*sizes.split(), "--case-seconds", "0.05", "--out", str(tmp_path)])
    results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    assert results and all(r["us"] > 0 for r in results)
    assert all("eager" in r["timings_s"] or "bmm" in r["timings_s"] for r in results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_profile_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--shapes 512x768 --ranks 16 --rows 64 --passes fwd --compile none --profile"
    bench_linear.main([*sizes.split(), "--out", str(tmp_path)])
    tables = capsys.readouterr().out.split("\n\n")[-1]
    bare = tables[tables.index("bare addmm") :].splitlines()[1]
    assert "kernel launches per pass" in bare and not bare.strip().startswith("0 ")
    assert list(tmp_path.glob("trace-512x768-*.json"))
