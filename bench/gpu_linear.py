"""``bench_linear`` on a GPU; without one, what it would run there and a modelled roofline."""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import common, gpu_report, gpu_timing, profiling, roofline, tables
from bench.gpu_cases import chosen_backend, contenders, wants_compile
from bench.gpu_report import GpuResult
from bench.gpu_timing import CudaGpu, Gpu, PeakMeter
from bench.linear_cases import Call, Case, Operands, Weights, attempt, check_agreement
from bench.roofline import Chip

NO_GPU = "no CUDA device: PyTorch sees none, so nothing is measured"


def model(cases: Sequence[Case], chip: Chip, out: Path) -> None:
    """Print the cases that a GPU would run, with a modelled roofline for each; write it as JSON."""
    print(NO_GPU)
    print(f"with one, these {len(cases)} cases would be timed by CUDA graphs on a cold L2 cache;")
    print("contenders: ours (chosen, triton, cuda), bare cuBLAS by F.linear, addmm and cuBLASLt,")
    print("eager, torch.compile(max-autotune), two-step (beta = 1), EigenTune\n")
    print("what follows is MODELLED, for an assumed chip; no number below was measured")
    print(roofline.FORMULA)
    print(f"{chip.line()}\n")
    columns = gpu_report.MODELLED_COLUMNS
    print(tables.table_line(columns, columns))
    lines = [gpu_report.modelled_cells(case, chip) for case in cases]
    for line in lines:
        print(tables.table_line(line, columns))
    print(f"\n{gpu_report.modelled_means_text(cases, chip)}")
    content = {
        "benchmark": "linear on a GPU",
        "modelled": True,
        "formula": roofline.FORMULA.splitlines(),
        "assumed": {"bytes_per_s": chip.bandwidth, "flops_16_bit": chip.flops},
        "results": [dict(zip(columns, line, strict=True)) for line in lines],
    }
    print(f"wrote {common.write_json(out, 'linear-gpu-modelled', content)}")


def measure(
    case: Case, weights: Weights, gpu: Gpu, *, with_compile: bool, budget_s: float
) -> GpuResult:
    """Time one case: all contenders in turn, after seeing that their graphs agree.

    Raises:
        RuntimeError: contenders differ, or ours or eager could not be captured.
    """
    gpu_timing.set_precision(case.dtype)
    with torch.set_grad_enabled(case.trains):
        ops = Operands(case, weights.linear, gpu.device)
        steps, skipped = contenders(case, ops, with_compile=with_compile)
        size = ops.x.nbytes + ops.grad_y.nbytes
        count = gpu_timing.copies(size, gpu.l2_bytes)
        inputs = gpu_timing.input_sets(ops.x, ops.grad_y, count, trains=case.trains)
        graphs, failed = gpu_timing.capture(steps, inputs, gpu)
        check_agreement(case, {name: ways[0] for name, ways in graphs.items()})
        timings = gpu_timing.interleaved(graphs, gpu, budget_s=budget_s)
    return GpuResult(case, chosen_backend(case, gpu.device), timings, skipped | failed)


def profile(cases: Sequence[Case], *, compile_: str, out: Path) -> None:
    """Kernels and launches per pass of every contender, and a chrome trace of each."""
    print(CudaGpu().line())
    for case in cases:
        gpu_timing.set_precision(case.dtype)
        with torch.set_grad_enabled(case.trains):
            weights = Weights(case.shape, case.dtype, "cuda")
            ops = Operands(case, weights.linear, "cuda")
            steps, skipped = contenders(case, ops, with_compile=compile_ != "none")
            [(x, grad_y)] = gpu_timing.input_sets(ops.x, ops.grad_y, 1, trains=case.trains)
            calls = {name: functools.partial(step, x, grad_y) for name, step in steps.items()}
            made, failed = attempt({n: functools.partial(_tried, c) for n, c in calls.items()})
            print(f"\n{case}\n{profiling.profile(made, out, case.slug, 'cuda')}", flush=True)
        print(tables.skipped_text([skipped | failed]))


def _tried(call: Call) -> Call:
    call()
    return call


def run(
    cases: Sequence[Case], gpu: Gpu, *, compile_: str, budget_s: float, minutes: float, out: Path
) -> list[GpuResult]:
    """All cases, a line each as it is measured; those after the time limit are left out, aloud."""
    print(gpu.line())
    print(f"LORAXS_AUTOTUNE: {os.environ.get('LORAXS_AUTOTUNE') or 'not set'}")
    print(f"a graph of one tiny kernel reads {gpu_timing.replay_floor(gpu) * 1e6:.1f} µs")
    meter = PeakMeter(gpu)
    columns = gpu_report.COLUMNS
    print(f"{len(cases)} cases\n\n{tables.table_line(columns, columns)}", flush=True)
    results: list[GpuResult] = []
    weights: Weights | None = None
    kind: tuple[tuple[int, int], str] | None = None
    start = time.monotonic()
    for index, case in enumerate(cases):
        if time.monotonic() - start > 60 * minutes:
            print(f"{len(cases) - index} cases left out: {minutes:g} minutes are over (--minutes)")
            break
        if weights is None or kind != (case.shape, case.dtype):
            weights, kind = None, (case.shape, case.dtype)
            gc.collect()
            weights = Weights(case.shape, case.dtype, gpu.device)
        meter.update(case.dtype)
        with_compile = compile_ == "all" or (compile_ == "some" and wants_compile(case))
        try:
            result = measure(case, weights, gpu, with_compile=with_compile, budget_s=budget_s)
        except torch.OutOfMemoryError:
            print(f"{case} left out: out of memory", flush=True)
            continue
        results.append(result)
        line = tables.table_line(gpu_report.cells(result, meter.best), columns)
        print(line, flush=True)
    sections = [
        tables.skipped_text(r.skipped for r in results),
        tables.means_text(gpu_report.means(results)),
        "\n".join(meter.best.lines()),
        "\n".join(_write(results, meter, gpu, out)),
    ]
    print("\n" + "\n\n".join(section for section in sections if section))
    return results


def _write(results: list[GpuResult], meter: PeakMeter, gpu: Gpu, out: Path) -> list[str]:
    peak, machine = meter.best, gpu.line()
    content = {
        "benchmark": "linear on a GPU",
        "modelled": False,
        "gpu": machine,
        "peak_flops": peak.flops,
        "copy_bytes_per_s": peak.bandwidth,
        "replay_floor_s": gpu_timing.replay_floor(gpu),
        "results": [result.as_json(peak) for result in results],
        "means": tables.means_json(gpu_report.means(results)),
    }
    plot = (lambda path: gpu_report.plot(results, path, machine)) if results else None
    return tables.write_results(out, "linear-gpu", content, plot)
