"""The LoRA-XS linear layer beside the bare layer, eager PyTorch, torch.compile and EigenTune.

    python -m bench.bench_linear [--device auto|cpu|cuda] [--quick] [--markdown] [--profile]

Prints one line per case, geometric means and the project's own bar; writes JSON and a plot to
``bench/out``. What the columns mean and what to be wary of: ``bench/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import (
    arguments,
    common,
    devices,
    gpu_cases,
    gpu_linear,
    linear_cases,
    linear_report,
    profiling,
    tables,
)
from bench.gpu_timing import CudaGpu
from bench.linear_cases import (
    Case,
    Weights,
    check_agreement,
    contenders,
    wants_compile,
)
from bench.linear_report import Result
from bench.peak import Meter, Peak
from loraxs_kernels import info


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("bench_linear", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="a dozen small cases, about a minute")
    arguments.add_layer_options(parser, case_seconds=0.8)
    add("--compile", choices=("none", "some", "all"), help="default: some (with --quick: none)")
    add("--markdown", action="store_true", help="also print the README's table (CPU)")
    add("--profile", action="store_true", help="profile instead: kernels per pass, chrome traces")
    arguments.add_run_options(parser)
    return parser


class Peaks:
    """The FMA peak, measured anew from time to time: clocks drift, the best reading counts."""

    _EVERY_S = 60.0

    def __init__(self) -> None:
        self.best = Peak()
        self._meter: Meter | None = None
        self._last = -self._EVERY_S
        try:
            self._meter = Meter()
            self.update()
        except RuntimeError as error:
            self._meter = None
            self.best.missing = {"fp32": str(error)}

    def update(self) -> None:
        """Measure again if the last time is long ago.

        Raises:
            RuntimeError: the loop did not run.
        """
        if self._meter is not None and time.monotonic() - self._last >= self._EVERY_S:
            peak = self._meter.measure()
            self.best.merge(peak)
            self.best.missing = peak.missing
            self._last = time.monotonic()


def measure(case: Case, weights: Weights, *, with_compile: bool, budget_s: float = 0.8) -> Result:
    """Time one case: all contenders in turn, after seeing that they agree.

    Raises:
        RuntimeError: contenders differ in what they compute.
    """
    with torch.set_grad_enabled(case.trains):
        calls, skipped = contenders(case, weights, with_compile=with_compile)
        check_agreement(case, calls)
        return Result(case, common.interleaved(calls, budget_s=budget_s), skipped)


def run(
    cases: Sequence[Case], peaks: Peaks, *, compile_: str, budget_s: float, minutes: float
) -> list[Result]:
    """All cases, a line each as it is measured; those after the time limit are left out, aloud."""
    print(linear_report.line(linear_report.COLUMNS), flush=True)
    results: list[Result] = []
    weights: Weights | None = None
    kind: tuple[tuple[int, int], str] | None = None
    start = time.monotonic()
    for index, case in enumerate(cases):
        if time.monotonic() - start > 60 * minutes:
            print(f"{len(cases) - index} cases left out: {minutes:g} minutes are over (--minutes)")
            break
        if weights is None or kind != (case.shape, case.dtype):
            weights = None  # frees the former weights, and with them all packed copies
            gc.collect()
            weights, kind = Weights(case.shape, case.dtype), (case.shape, case.dtype)
        peaks.update()
        with_compile = compile_ == "all" or (compile_ == "some" and wants_compile(case))
        results.append(measure(case, weights, with_compile=with_compile, budget_s=budget_s))
        print(linear_report.line(linear_report.cells(results[-1], peaks.best)), flush=True)
    return results


def _write(results: list[Result], peaks: Peaks, out: Path) -> list[str]:
    peak, isa = peaks.best, torch.backends.cpu.get_cpu_capability()
    content = {
        "benchmark": "linear",
        "peak_gflops": peak.gflops,
        "peak_missing": peak.missing,
        "results": [result.as_json(peak) for result in results],
        "means": tables.means_json(linear_report.means(results)),
        "bar": [vars(demand) for demand in linear_report.demands(results, isa)],
    }
    machine = common.machine_line()
    plot = (lambda path: linear_report.plot(results, path, machine)) if results else None
    return tables.write_results(out, "linear", content, plot)


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    arguments.set_threads(parser, args)
    device = devices.resolve(args.device)
    cases = _cases(parser, args, device)
    budget_s = args.case_seconds or (0.3 if args.quick else 0.8)
    compile_ = args.compile or ("none" if args.quick else "some")
    if device == "cuda":
        _main_gpu(args, cases, compile_, budget_s)
    elif args.profile:
        _profile(cases, args.out, with_compile=compile_ == "all")
    else:
        _main_cpu(args, cases, compile_, budget_s)


def _cases(parser: argparse.ArgumentParser, args: argparse.Namespace, device: str) -> list[Case]:
    chosen = (args.shapes, args.ranks, args.rows, args.dtypes, args.passes)
    asked = any(option is not None for option in chosen)
    kinds = gpu_cases if device == "cuda" else linear_cases
    arguments.check_layer_options(parser, args, device, asked=asked)
    if args.quick:
        return kinds.quick_cases()
    cases = kinds.profiled_cases() if args.profile and not asked else kinds.select(*chosen)
    if not cases:
        parser.error("no case is left: a rank cannot exceed the shape")
    return cases


def _main_gpu(args: argparse.Namespace, cases: list[Case], compile_: str, budget_s: float) -> None:
    if not torch.cuda.is_available():
        gpu_linear.model(cases, devices.chip(args), args.out)
    elif args.profile:
        gpu_linear.profile(cases, compile_=compile_, out=args.out)
    else:
        gpu = CudaGpu()
        gpu_linear.run(
            cases, gpu, compile_=compile_, budget_s=budget_s, minutes=args.minutes, out=args.out
        )


def _profile(cases: list[Case], out: Path, *, with_compile: bool) -> None:
    print(common.machine_line())
    for case in cases:
        with torch.set_grad_enabled(case.trains):
            weights = Weights(case.shape, case.dtype)
            calls, skipped = contenders(case, weights, with_compile=with_compile)
            print(f"\n{case}\n{profiling.profile(calls, out, case.slug, 'cpu')}", flush=True)
        print(tables.skipped_text([skipped]))


def _main_cpu(args: argparse.Namespace, cases: list[Case], compile_: str, budget_s: float) -> None:
    print(common.machine_line())
    print("\n".join(text for text in info.report().splitlines() if "compiled CPU" in text))
    peaks = Peaks()
    print("\n".join(peaks.best.lines()))
    print(f"{len(cases)} cases")
    print(f"{common.load_warning()}\n", flush=True)
    results = run(cases, peaks, compile_=compile_, budget_s=budget_s, minutes=args.minutes)
    isa = torch.backends.cpu.get_cpu_capability()
    sections = [
        tables.skipped_text(r.skipped for r in results),
        tables.means_text(linear_report.means(results)),
        linear_report.worst_text(results),
        linear_report.demands_text(linear_report.demands(results, isa)),
        "\n".join([*peaks.best.lines(), common.load_warning()]).strip(),
    ]
    if args.markdown:
        table = linear_report.markdown(results, peaks.best)
        sections.append(f"{table}\n\nMachine: {common.machine_line()}")
    sections.append("\n".join(_write(results, peaks, args.out)))
    print("\n" + "\n\n".join(section for section in sections if section))


if __name__ == "__main__":
    main()
