"""Whole training steps of real models on real text: LoRA-XS here, eagerly, EigenTune, PEFT LoRA.

    python -m bench.bench_train [--models minilm,smollm2] [--minutes 4.5] [--markdown]

Tokens per second with and without activation checkpointing, peak memory, sizes, start-up time, and
the latency of generation with 0, 1 and 64 adapters. Results are kept in ``bench/out/train.json``
job by job: the same command goes on where an earlier one stopped, and measures again what others
disturbed. Columns: ``bench/README.md``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import arguments, common, generation, train_methods, train_report
from bench.bench_svd import openblas_variables
from bench.train_methods import METHODS, OURS
from bench.train_models import SUBJECTS, Subject, tokens

PARTS = ("train", "memory", "generation")
NAME = "train"


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("bench_train", __doc__)
    add = parser.add_argument
    names = tuple(SUBJECTS)
    add("--models", type=arguments.names(names), default=list(names), help=", ".join(names))
    add("--parts", type=arguments.names(PARTS), default=list(PARTS), help=", ".join(PARTS))
    add("--rank", type=int, default=16)
    add("--case-seconds", type=float, default=15.0, help="timing per model and kind of step")
    add("--fresh", action="store_true", help="forget what earlier runs measured")
    add("--markdown", action="store_true", help="also print the tables of the documentation")
    add("--docs", type=Path, metavar="FILE", help="put the tables between FILE's markers")
    arguments.add_run_options(parser)
    return parser


# --------------------------------------------------------------------------------------- jobs


def time_steps(
    subject: Subject, rank: int, recomputed: bool, methods: Sequence[str], budget_s: float
) -> dict[str, Any]:
    """Steps of all methods in turns, from the same weights, on the same batches.

    Returns:
        ``tokens`` of a step, and ``timings_s`` by method.

    Raises:
        RuntimeError: methods that should compute the same do not.
    """
    batches = subject.text()
    ours = train_methods.attach(OURS, subject, subject.build(), rank)
    adapted = {OURS: ours}
    for method in methods:
        if method != OURS:
            adapted[method] = train_methods.attach_alike(method, subject, ours.model, rank)
    for one in adapted.values():
        train_methods.checkpointing(subject, one.model, recomputed)
    train_methods.check_agreement(adapted, batches[0])
    calls = {name: functools.partial(one.step, batches) for name, one in adapted.items()}
    others = common.Others()
    timings = common.interleaved(calls, budget_s=budget_s, min_rounds=3, slow_call_s=60.0)
    return {"tokens": tokens(batches[0]), "timings_s": timings, "others": others.sentence()}


def _memory(name: str, method: str, rank: int) -> dict[str, Any]:
    """What ``bench.train_memory`` prints in a fresh process."""
    command = [sys.executable, "-m", "bench.train_memory", name, method, "--rank", str(rank)]
    command += ["--threads", str(torch.get_num_threads())]
    environment = dict(os.environ)
    for variable in openblas_variables(environment):
        del environment[variable]  # scikit-learn gets as many threads as PyTorch
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _generation(subject: Subject, rank: int) -> dict[str, Any]:
    others = common.Others()
    found = generation.as_json(generation.measure(subject, rank))
    return {"rows": found, "others": others.sentence()}


def jobs(
    models: Sequence[str], parts: Sequence[str], rank: int, budget_s: float
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is to be measured, by its name in the results."""
    made: dict[str, Callable[[], dict[str, Any]]] = {}
    subjects = {name: functools.cache(SUBJECTS[name]) for name in models}
    for name in models:
        if "train" in parts:
            for kind in ("kept", "recomputed"):
                made[f"train {name} {kind}"] = lambda n=name, k=kind: time_steps(  # type: ignore[misc]
                    subjects[n](), rank, k == "recomputed", METHODS, budget_s
                )
        if "generation" in parts and name == "smollm2":
            made[f"generation {name}"] = lambda n=name: _generation(subjects[n](), rank)  # type: ignore[misc]
        if "memory" in parts:
            for method in METHODS:
                made[f"memory {name} {method}"] = functools.partial(_memory, name, method, rank)
    return made


# ------------------------------------------------------------------------------------ results


def _kept(path: Path, settings: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
    """The results of earlier runs with the same settings."""
    if fresh or not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    results: dict[str, Any] = stored["results"] if stored.get("settings") == settings else {}
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    arguments.set_threads(parser, args)
    # transformers renames arguments; this runs on versions that know only the old names.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.rank < 1:
        parser.error(f"--rank: got {args.rank}, expected at least 1")
    settings = {"rank": args.rank, "threads": torch.get_num_threads(), "torch": torch.__version__}
    path = args.out / f"{NAME}.json"
    results = _kept(path, settings, fresh=args.fresh)
    print(common.machine_line())
    print(f"{common.load_warning()}\n", flush=True)
    start, left_out = time.monotonic(), 0
    for job, run in jobs(args.models, args.parts, args.rank, args.case_seconds).items():
        if job in results and not train_report.disturbed(results[job]):
            continue
        if time.monotonic() - start > 60 * args.minutes:
            left_out += 1
            continue
        began = time.monotonic()
        # Through JSON, so that what an earlier run measured looks the same.
        results[job] = json.loads(json.dumps(run(), default=common.plain))
        common.write_json(args.out, NAME, {"settings": settings, "results": results})
        print(
            f"{job}: {time.monotonic() - began:.0f} s {results[job].get('others', '')}", flush=True
        )
    if left_out:
        print(f"{left_out} jobs left out: {args.minutes:g} minutes are over; run it again")
    print(f"\n{train_report.text(results)}\n\n{path}")
    if args.markdown or args.docs:
        tables = f"{train_report.markdown(results)}\n\nMachine: {common.machine_line()}"
        if args.markdown:
            print(f"\n{tables}")
        if args.docs:
            train_report.replace_between_markers(args.docs, tables)


if __name__ == "__main__":
    main()
