"""LoRA-XS with an adapter per row: rows x adapters x popularity, beside what others would do.

    python -m bench.bench_multi [--device auto|cpu|cuda] [--quick]

Prints one line per case and geometric means; writes JSON and a plot to ``bench/out``. What the
columns mean and what to be wary of: ``bench/README.md``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import arguments, common, devices, gpu_timing, multi_report, roofline, tables
from bench.gpu_cases import chosen_backend
from bench.gpu_linear import NO_GPU
from bench.gpu_timing import Gpu
from bench.linear_cases import Weights
from bench.multi_cases import (
    ADAPTERS,
    PASSES,
    MultiCase,
    MultiOperands,
    check_agreement,
    contenders,
    default_cases,
    quick_cases,
    select,
)
from bench.multi_report import MultiResult
from bench.popularity import KINDS, ORDERS
from bench.roofline import Chip


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("bench_multi", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="a dozen cases, less than a minute")
    arguments.add_layer_options(parser, case_seconds=0.5)
    add("--adapters", type=arguments.numbers, help="e.g. 1,8,64,1024")
    add("--popularity", type=arguments.names(KINDS), help=", ".join(KINDS))
    add("--orders", type=arguments.names(ORDERS), help=", ".join(ORDERS))
    arguments.add_run_options(parser)
    return parser


def _cases(
    parser: argparse.ArgumentParser, args: argparse.Namespace, device: str
) -> list[MultiCase]:
    chosen = (
        args.shapes, args.ranks, args.rows, args.adapters, args.popularity, args.orders,
        args.dtypes, args.passes,
    )  # fmt: skip
    asked = any(option is not None for option in chosen)
    arguments.check_layer_options(parser, args, device, asked=asked)
    if args.quick:
        return quick_cases(device)
    if not asked:
        return default_cases(device)
    shape, rank, dtype = ((1024, 1024), 16, "fp32")
    if device == "cuda":
        shape, rank, dtype = ((4096, 4096), 64, "bf16")
    cases = select(
        args.shapes or [shape], args.ranks or [rank], args.rows or [16, 1024],
        args.adapters or ADAPTERS, args.popularity or KINDS, args.orders or ORDERS,
        args.dtypes or [dtype], args.passes or PASSES,
    )  # fmt: skip
    if not cases:
        parser.error("no case is left: a rank cannot exceed the shape")
    return cases


def measure(case: MultiCase, weights: Weights, gpu: Gpu | None, *, budget_s: float) -> MultiResult:
    """Time one case: all contenders in turn, after seeing that they agree.

    Args:
        case: the case.
        weights: of its shape and dtype.
        gpu: the GPU; ``None`` on the CPU.
        budget_s: seconds of timing.

    Raises:
        RuntimeError: contenders differ in what they compute.
    """
    device, layer = "cpu" if gpu is None else gpu.device, case.layer
    with torch.set_grad_enabled(layer.trains):
        ops = MultiOperands(case, weights, device)
        found, skipped = contenders(case, ops, weights)
        steps = {name: contender.step for name, contender in found.items()}
        if gpu is None:
            [(x, grad_y)] = gpu_timing.input_sets(ops.x, ops.grad_y, 1, trains=layer.trains)
            calls = {n: functools.partial(one, x, grad_y) for n, one in steps.items()}
            check_agreement(case, found, dict(calls))
            timings = common.interleaved(calls, budget_s=budget_s)
        else:
            gpu_timing.set_precision(layer.dtype)
            count = gpu_timing.copies(ops.x.nbytes + ops.grad_y.nbytes, gpu.l2_bytes)
            inputs = gpu_timing.input_sets(ops.x, ops.grad_y, count, trains=layer.trains)
            graphs, failed = gpu_timing.capture(steps, inputs, gpu, required=("ours", "bmm"))
            check_agreement(case, found, {name: ways[0] for name, ways in graphs.items()})
            timings = gpu_timing.interleaved(graphs, gpu, budget_s=budget_s)
            skipped |= failed
    return MultiResult(case, chosen_backend(layer, device, per_row=True), timings, skipped)


def run(
    cases: Sequence[MultiCase], gpu: Gpu | None, *, budget_s: float, minutes: float
) -> list[MultiResult]:
    """All cases, a line each as it is measured; those after the time limit are left out, aloud."""
    columns = multi_report.COLUMNS
    print(f"{len(cases)} cases\n\n{tables.table_line(columns, columns)}", flush=True)
    results: list[MultiResult] = []
    weights: Weights | None = None
    kind: tuple[tuple[int, int], str] | None = None
    start = time.monotonic()
    for index, case in enumerate(cases):
        if time.monotonic() - start > 60 * minutes:
            print(f"{len(cases) - index} cases left out: {minutes:g} minutes are over (--minutes)")
            break
        if weights is None or kind != (case.layer.shape, case.layer.dtype):
            weights, kind = None, (case.layer.shape, case.layer.dtype)
            gc.collect()
            weights = Weights(*kind, "cpu" if gpu is None else gpu.device)
        try:
            results.append(measure(case, weights, gpu, budget_s=budget_s))
        except torch.OutOfMemoryError:
            print(f"{case} left out: out of memory", flush=True)
            continue
        print(tables.table_line(multi_report.cells(results[-1]), columns), flush=True)
    return results


def model(cases: Sequence[MultiCase], chip: Chip, out: Path) -> None:
    """Print the cases that a GPU would run, with a modelled roofline for each; write it as JSON."""
    print(NO_GPU)
    print(f"with one, these {len(cases)} cases would be timed by CUDA graphs on a cold L2 cache;")
    print("contenders: ours, one adapter for all (single), bare cuBLAS, a loop over adapters,")
    print("gathered cores (bmm), ordinary LoRA with a pair of factors per adapter\n")
    print("what follows is MODELLED, for an assumed chip; no number below was measured")
    print(roofline.FORMULA)
    print(
        "  here each core that occurs is read once per pass, with 8 bytes of id per row, and every"
    )
    print("  adapter's gradient is written once; LoRA: each pair of factors that occurs, instead")
    print(f"{chip.line()}\n")
    columns = multi_report.MODELLED_COLUMNS
    lines = [multi_report.modelled_cells(case, chip) for case in cases]
    for line in (columns, *lines):
        print(tables.table_line(line, columns))
    content = {
        "benchmark": "multi on a GPU",
        "modelled": True,
        "formula": roofline.FORMULA.splitlines(),
        "assumed": {"bytes_per_s": chip.bandwidth, "flops_16_bit": chip.flops},
        "results": [dict(zip(columns, line, strict=True)) for line in lines],
    }
    print(f"\nwrote {common.write_json(out, 'multi-gpu-modelled', content)}")


def _write(results: list[MultiResult], device: str, machine: str, out: Path) -> list[str]:
    content = {
        "benchmark": "multi",
        "modelled": False,
        "device": machine,
        "results": [result.as_json() for result in results],
        "means": tables.means_json(multi_report.means(results)),
    }
    plot = (lambda path: multi_report.plot(results, path, machine)) if results else None
    return tables.write_results(out, "multi" if device == "cpu" else "multi-gpu", content, plot)


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    arguments.set_threads(parser, args)
    device = devices.resolve(args.device)
    cases = _cases(parser, args, device)
    if device == "cuda" and not torch.cuda.is_available():
        model(cases, devices.chip(args), args.out)
        return
    gpu = gpu_timing.CudaGpu() if device == "cuda" else None
    machine = common.machine_line() if gpu is None else gpu.line()
    print(machine)
    print(f"{common.load_warning()}\n" if device == "cpu" else "")
    budget_s = args.case_seconds or (0.3 if args.quick else 0.5)
    results = run(cases, gpu, budget_s=budget_s, minutes=args.minutes)
    sections = [
        tables.skipped_text(r.skipped for r in results),
        tables.means_text(multi_report.means(results)),
        common.load_warning() if device == "cpu" else "",
        "\n".join(_write(results, device, machine, args.out)),
    ]
    print("\n" + "\n\n".join(section for section in sections if section))


if __name__ == "__main__":
    main()
