"""The initializer's truncated SVD beside PyTorch, scikit-learn (the official code) and ARPACK.

    python -m bench.bench_svd [--quick | --full] [--markdown]

Prints time and accuracy of every contender on matrices with the spectra of pretrained weights and
on all layers of real models, and the project's own bar; writes JSON and a plot to ``bench/out``.
What the columns mean and what to be wary of: ``bench/README.md``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from threadpoolctl import threadpool_info, threadpool_limits

import loraxs_kernels
from bench import arguments, common, svd_report
from bench.svd_contenders import OURS, contenders, cut_short
from bench.svd_matrices import MODEL_NAMES, MODELS, SPECTRA, Case, synthetic
from bench.svd_measure import Result, measure_matrix, measure_model, several_at_once
from bench.svd_metrics import cached_exact

#: Beyond this the truth holds nothing; ranks may be anything below.
LARGEST_RANK = 64


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("bench_svd", __doc__)
    numbers, names = arguments.numbers_or_none, arguments.names
    add = parser.add_argument
    add("--quick", action="store_true", help="one matrix and MiniLM, about a minute")
    add("--full", action="store_true", help="all spectra, and models at r = 4 and 64 too")
    add("--sizes", type=numbers, help="of square matrices (default 4096,2048), or none")
    add("--spectra", type=names(SPECTRA, or_none=True), help=f"some of {','.join(SPECTRA)}")
    add("--ranks", type=numbers, help="for the matrices (default 16,64)")
    models = names(tuple(MODELS), or_none=True)
    add("--models", type=models, help="default minilm,smollm2; or none")
    add("--model-ranks", type=numbers, help="default 16")
    add("--passes", type=int, help="over a model's layers (default 3, with --quick 1)")
    add("--case-seconds", type=float, help="timing per matrix (default 20, with --quick 3)")
    add("--markdown", action="store_true", help="also print the tables of the documentation")
    add("--truth", type=Path, help="folder of the float64 truths (default OUT/truth)")
    arguments.add_run_options(parser, minutes=10.0, threads=2)
    return parser


def _completed(args: argparse.Namespace) -> argparse.Namespace:
    """Defaults that depend on --quick and --full."""
    quick, full = args.quick, args.full
    defaults = {
        "sizes": [1024] if quick else [4096, 2048],
        "spectra": ["flat"] if quick else list(SPECTRA) if full else ["flat", "real"],
        "ranks": [16] if quick else [16, 64],
        "models": ["minilm"] if quick else list(MODELS),
        "model_ranks": [4, 16, 64] if full else [16],
        "passes": 1 if quick else 3,
        "case_seconds": 3.0 if quick else 20.0,
        "truth": args.out / "truth",
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def openblas_variables(environment: dict[str, str]) -> dict[str, str]:
    """Settings that change NumPy's BLAS (its kernel, its threads); users have none of them."""
    return {k: v for k, v in environment.items() if k.startswith("OPENBLAS_")}


def _restart_without(variables: dict[str, str]) -> None:
    """OpenBLAS reads its variables when it is loaded, which has happened: begin anew."""
    print(f"set aside: {' '.join(f'{k}={v}' for k, v in variables.items())}", flush=True)
    rest = {k: v for k, v in os.environ.items() if k not in variables}
    os.execve(sys.executable, [sys.executable, "-m", "bench.bench_svd", *sys.argv[1:]], rest)


def blas_lines() -> list[str]:
    """Which BLAS NumPy and SciPy run, with which kernel; and PyTorch's."""
    lines = []
    for library in threadpool_info():
        if library["user_api"] == "blas":
            kernel = library.get("architecture") or "-"
            where = Path(library["filepath"]).parent.name
            lines.append(
                f"BLAS in {where}: {library['internal_api']} {library['version']}, "
                f"kernel {kernel}, {library['num_threads']} threads"
            )
    mkl = "MKL" if torch.backends.mkl.is_available() else "not MKL"
    onednn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    return [*lines, f"BLAS in torch: {mkl}, {onednn}, {torch.get_num_threads()} threads"]


# -------------------------------------------------------------------------------------------- jobs


class Jobs:
    """Runs one job after the other until the time is over, and prints each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: list[Result] = []
        self.left_out: list[str] = []
        self._start = time.monotonic()

    def _time_is_over(self, job: str) -> bool:
        over = time.monotonic() - self._start > 60 * self.args.minutes
        if over:
            self.left_out.append(job)
        return over

    def _keep(self, result: Result) -> None:
        self.results.append(result)
        self.write()  # what is there survives if the run is ended
        print(f"{svd_report.result_text(result)}\n", flush=True)

    def write(self) -> Path:
        """Everything so far as JSON; returns the file's path."""
        content = {
            "benchmark": "svd",
            "loraxs_kernels": loraxs_kernels.__version__,
            "blas": blas_lines(),
            "results": [result.as_json() for result in self.results],
            "left_out": self.left_out,
            "bar": [vars(line) for line in svd_report.bar(self.results)],
        }
        return common.write_json(self.args.out, "svd", content)

    def matrices(self, spectrum: str) -> None:
        """All sizes and ranks with one spectrum."""
        for size in self.args.sizes:
            ranks = [rank for rank in self.args.ranks if rank < size]
            matrix = truth = None
            for case in [Case(size, spectrum, rank) for rank in ranks]:
                if self._time_is_over(str(case)):
                    continue
                if matrix is None or truth is None:
                    matrix = synthetic(size, spectrum)
                    truth = cached_exact(matrix, max(ranks) + 1, self.args.truth)
                others = common.Others()
                measured = measure_matrix(
                    matrix, truth, case.rank, contenders(case.rank),
                    budget_s=self.args.case_seconds,
                )  # fmt: skip
                job = f"{size}² {spectrum}"
                self._keep(
                    Result(job, case.rank, measured, size, spectrum, others=others.sentence())
                )

    def model(self, name: str) -> None:
        """All layers of one model, at every rank."""
        ranks = [r for r in self.args.model_ranks if not self._time_is_over(f"{name} r={r}")]
        if not ranks:
            return
        matrices = [matrix for _, matrix in MODELS[name]()]
        truths = [cached_exact(w, max(ranks) + 1, self.args.truth) for w in matrices]
        for rank in ranks:
            whole = several_at_once((*OURS[2:], *cut_short(rank)))
            others = common.Others()
            measured = measure_model(
                matrices, truths, rank, contenders(rank), whole, passes=self.args.passes
            )
            job, layers = MODEL_NAMES[name], len(matrices)
            self._keep(Result(job, rank, measured, layers=layers, others=others.sentence()))

    def run(self) -> None:
        """The first spectrum, the models, the other spectra."""
        first, others = self.args.spectra[:1], self.args.spectra[1:]
        for spectrum in first:
            self.matrices(spectrum)
        for name in self.args.models:
            self.model(name)
        for spectrum in others:
            self.matrices(spectrum)


def _write(jobs: Jobs) -> list[str]:
    out = jobs.args.out
    written = [f"wrote {jobs.write()}"]
    try:
        svd_report.plot(jobs.results, out / "svd.png", common.machine_line())
        written.append(f"wrote {out / 'svd.png'}")
    except ImportError as error:
        written.append(f"no plot: {error}")
    return written


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = _completed(parser.parse_args(argv))
    if args.quick and args.full:
        parser.error("--quick and --full exclude each other")
    if args.threads < 1 or args.passes < 1:
        parser.error("--threads and --passes: expected at least 1")
    if max([*args.ranks, *args.model_ranks], default=1) > LARGEST_RANK:
        parser.error(f"ranks: expected at most {LARGEST_RANK}")
    torch.set_num_threads(args.threads)
    with threadpool_limits(limits=args.threads, user_api="blas"):
        print("\n".join([common.machine_line(), *blas_lines()]))
        print(f"{common.load_warning()}\n", flush=True)
        jobs = Jobs(args)
        jobs.run()
        lines = svd_report.bar(jobs.results)
        sections = [svd_report.bar_text(lines)]
        if jobs.left_out:
            over = f"{args.minutes:g} minutes are over (--minutes)"
            sections.append(f"left out, since {over}: {', '.join(jobs.left_out)}")
        if args.markdown:
            machine = "\n".join([f"Machine: {common.machine_line()}", *blas_lines()])
            sections.append(f"{svd_report.markdown(jobs.results, lines)}\n\n{machine}")
        sections.append("\n".join([*_write(jobs), common.load_warning()]).strip())
        print("\n\n".join(sections))


if __name__ == "__main__":
    if variables := openblas_variables(dict(os.environ)):
        _restart_without(variables)
    main()
