"""The demo from end to end: options, one method after another, the report."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from .data import (
    Batch,
    DataError,
    Example,
    Snippet,
    fetch_archive,
    make_batches,
    read_snippets,
    split_snippets,
)
from .methods import METHODS, Method, attach, count, eager_twin, load, save, trained_parameters
from .model import Base, load_minilm
from .report import (
    Comparison,
    DemoResult,
    Facts,
    MethodResult,
    print_report,
    write_json,
    write_plot,
)
from .training import Trainer, accuracy, median_ms, predict, time_layers

COMPARED = "lora-xs-16"  # run beside its eager twin
JUDGE_BATCH = 64


class DemoError(RuntimeError):
    """The demo cannot run as asked; the message says why."""


@dataclass(frozen=True)
class Options:
    """What a run is made of; the defaults are the main job."""

    methods: tuple[Method, ...] = METHODS
    epochs: int = 1
    train_size: int = 5600
    test_size: int = 2000
    batch_size: int = 16
    compared_steps: int = 80
    seed: int = 0
    out: Path = Path("demo-out")
    device: str = "auto"
    threads: int | None = None


QUICK_METHODS = ("head", "lora-xs-4", "lora-xs-16")
QUICK = Options(
    methods=tuple(method for method in METHODS if method.key in QUICK_METHODS),
    train_size=160,
    test_size=96,
    compared_steps=5,
)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _methods(text: str) -> tuple[Method, ...]:
    known = {method.key: method for method in METHODS}
    keys = [key.strip() for key in text.split(",") if key.strip()]
    wrong = [key for key in keys if key not in known]
    if wrong or not keys:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(wrong) or 'nothing'}; choose from {', '.join(known)}"
        )
    return tuple(known[key] for key in dict.fromkeys(keys))


def parse_options(argv: Sequence[str]) -> Options:
    """Options from a command line; argparse prints what is wrong and leaves with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m loraxs_kernels demo",
        description="Fine-tune MiniLM-L6 on movie-review snippets: LoRA-XS, LoRA, VeRA.",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows that all works")
    parser.add_argument(
        "--methods",
        type=_methods,
        metavar="A,B,...",
        help="some of " + ", ".join(method.key for method in METHODS),
    )
    parser.add_argument("--epochs", type=_positive, help=f"default {Options.epochs}")
    parser.add_argument(
        "--train-size", type=_positive, help=f"snippets to train on, default {Options.train_size}"
    )
    parser.add_argument("--seed", type=_not_negative, help="of initial values and order, default 0")
    parser.add_argument("--out", type=Path, help=f"output folder, default {Options.out}")
    parser.add_argument("--device", help="cpu, cuda or auto (default: a GPU if there is one)")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    given = {
        key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None
    }
    base = QUICK if given.pop("quick") else Options()
    return Options(**{**vars(base), **given})


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU if there is one; anything else must exist.

    Raises:
        DemoError: The device cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch built without CUDA raises an AssertionError here
        raise DemoError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def run_command(argv: Sequence[str]) -> int:
    """Run the main job on the real model and text; returns the exit status."""
    options = parse_options(argv)
    console = Console()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        device = choose_device(options.device)
        archive = fetch_archive()
        result = run_demo(options, load_minilm(), read_snippets(archive), device, console)
    except (DataError, DemoError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return conclude(result, console)


def conclude(result: DemoResult, console: Console) -> int:
    """Say whether every reloaded adapter gave the same predictions: 0 if so, else 1."""
    differing = [row.label for row in result.methods if not row.same_predictions]
    if differing:
        console.print(f"[red]Reloaded predictions differ: {'; '.join(differing)}")
        return 1
    console.print(
        "Each adapter was saved, loaded into a fresh model, and gave the same prediction for every "
        f"one of the {result.settings['test_size']} held-out snippets."
    )
    return 0


def run_demo(
    options: Options,
    base: Base,
    snippets: Sequence[Snippet],
    device: torch.device,
    console: Console,
) -> DemoResult:
    """Train and judge every method, print the table, write the JSON file and the plot.

    Raises:
        DemoError: There are fewer snippets than asked for.
        OSError: The output folder cannot be written.
    """
    started = time.perf_counter()
    try:
        split = split_snippets(snippets, options.test_size, options.train_size)
    except ValueError as error:
        raise DemoError(str(error)) from error
    options.out.mkdir(parents=True, exist_ok=True)
    job = Job(
        options,
        base,
        device,
        train=_encode(base, split.train),
        test=make_batches(
            _encode(base, split.test), JUDGE_BATCH, device=device, pad_id=base.pad_id
        ),
    )
    console.print(
        f"{base.name}: {len(split.train):,} snippets to train on × {options.epochs}, "
        f"{len(split.test):,} held out, {device.type}, {torch.get_num_threads()} threads"
    )
    results: list[MethodResult] = []
    comparison: Comparison | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        for method in options.methods:
            row, compared = run_method(job, method, progress)
            results.append(row)
            comparison = compared or comparison
            if not console.is_terminal:  # where a bar is drawn once, at the very end
                console.print(f"{row.label}: {row.accuracy:.4f}, {row.train_seconds:.0f} s")
    settings: dict[str, int | float | str] = {
        "model": base.name,
        "seconds": round(time.perf_counter() - started, 1),
        **{name: value for name, value in vars(options).items() if isinstance(value, int)},
    }
    result = DemoResult(settings, describe_machine(device), results, comparison)
    print_report(result, console)
    written = [write_json(result, options.out), write_plot(result, options.out)]
    places = ", ".join(str(path) for path in written)
    console.print(f"{settings['seconds']} s in all. Written: {places}", highlight=False)
    return result


@dataclass(frozen=True)
class Job:
    """What all methods of a run share."""

    options: Options
    base: Base
    device: torch.device
    train: list[Example]
    test: list[Batch]

    def training_batches(self) -> list[Batch]:
        """The batches of all epochs, in the same order for every method."""
        o = self.options
        return [
            batch
            for epoch in range(o.epochs)
            for batch in make_batches(
                self.train,
                o.batch_size,
                device=self.device,
                pad_id=self.base.pad_id,
                seed=o.seed + epoch,
            )
        ]


def _encode(base: Base, snippets: Sequence[Snippet]) -> list[Example]:
    tokens = base.encode([snippet.text for snippet in snippets])
    return [Example(t, s.label) for t, s in zip(tokens, snippets, strict=True)]


def run_method(
    job: Job, method: Method, progress: Progress
) -> tuple[MethodResult, Comparison | None]:
    """Train one method, judge it, save it, load it into a fresh model and judge that."""
    options, device = job.options, job.device
    model, svd_seconds = attach(job.base.build(options.seed).to(device), method, options.seed)
    model.to(device)  # what peft has added
    batches = job.training_batches()
    trainer = Trainer(model, method, len(batches), device)
    twin = None
    if method.key == COMPARED:
        twin = Trainer(eager_twin(model), method, len(batches), device)

    task = progress.add_task(method.label, total=len(batches) + 2 * len(job.test), note="")
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        loss = _step(trainer, twin, batch, number, options.compared_steps)
        progress.update(task, advance=1, note=f"loss {loss:.3f}")
    train_seconds = time.perf_counter() - started

    def judged() -> None:
        progress.update(task, advance=1, note="judging")

    scores = predict(model, job.test, judged)
    directory = options.out / "adapters" / method.key
    if directory.exists():
        shutil.rmtree(directory)
    file_bytes = save(model, method, directory)
    # Another seed: a classifier that was not loaded would show.
    fresh = load(job.base.build(options.seed + 1).to(device), method, directory).to(device)
    reloaded = predict(fresh, job.test, judged)

    adapter, head = trained_parameters(model)
    row = MethodResult(
        key=method.key,
        label=method.label,
        kind=method.kind,
        rank=method.rank,
        adapter_lr=method.adapter_lr,
        head_lr=method.head_lr,
        adapter_numbers=count(adapter),
        head_numbers=count(head),
        accuracy=accuracy(scores, job.test),
        accuracy_reloaded=accuracy(reloaded, job.test),
        same_predictions=torch.equal(scores.argmax(dim=1), reloaded.argmax(dim=1)),
        largest_score_difference=(scores - reloaded).abs().max().item(),
        step_ms=trainer.median_ms(),
        train_seconds=train_seconds,
        file_bytes=file_bytes,
        svd_seconds=svd_seconds,
        first_loss=trainer.losses[0],
        last_loss=trainer.losses[-1],
    )
    progress.update(task, note=f"accuracy {row.accuracy:.4f}")
    comparison = None if twin is None else compare(model, trainer, twin, row, batches, device)
    return row, comparison


def _step(trainer: Trainer, twin: Trainer | None, batch: Batch, number: int, limit: int) -> float:
    """A training step; during the first ``limit`` the twin takes the same one, in turns."""
    if twin is None or number >= limit:
        return trainer.step(batch)
    if number % 2:
        twin.step(batch)
        return trainer.step(batch)
    loss = trainer.step(batch)
    twin.step(batch)
    return loss


def compare(
    model: nn.Module,
    trainer: Trainer,
    twin: Trainer,
    row: MethodResult,
    batches: Sequence[Batch],
    device: torch.device,
) -> Comparison:
    """Ours against eager: the steps that both took, and the adapted layers alone."""
    steps = len(twin.milliseconds)
    typical = sorted(batches, key=lambda batch: batch.ids.numel())[len(batches) // 2]
    layers = time_layers(model, typical, device)
    pairs = zip(trainer.losses[:steps], twin.losses, strict=True)
    return Comparison(
        key=row.key,
        label=row.label,
        steps=steps,
        ours_ms=median_ms(trainer.milliseconds[:steps]),
        eager_ms=median_ms(twin.milliseconds),
        largest_loss_difference=max(abs(ours - eager) for ours, eager in pairs),
        layers=layers.layers,
        layer_ours_ms=layers.ours_ms,
        layer_eager_ms=layers.eager_ms,
        layer_bare_ms=layers.bare_ms,
    )


def describe_machine(device: torch.device) -> Facts:
    """What the timings were taken on; nothing that names the machine."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
