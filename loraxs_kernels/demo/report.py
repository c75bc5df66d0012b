"""What the demo leaves behind: a table on the terminal, a JSON file and a plot."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

Facts = Mapping[str, int | float | str]

JSON_NAME = "results.json"
PLOT_NAME = "accuracy.png"
LABELS = {
    "head": "classifier alone",
    "lora-xs": "LoRA-XS (this package)",
    "vera": "VeRA",
    "lora": "LoRA",
}
MARKERS = {"lora-xs": "o", "vera": "s", "lora": "D"}


@dataclass(frozen=True)
class MethodResult:
    """One method, trained and judged.

    ``accuracy_reloaded`` and ``same_predictions`` speak of the adapter after it was saved and put
    on a fresh model; ``largest_score_difference`` is over all scores of that comparison.
    """

    key: str
    label: str
    kind: str
    rank: int
    adapter_lr: float
    head_lr: float
    adapter_numbers: int
    head_numbers: int
    accuracy: float
    accuracy_reloaded: float
    same_predictions: bool
    largest_score_difference: float
    step_ms: float
    train_seconds: float
    file_bytes: int
    svd_seconds: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Comparison:
    """The same LoRA-XS training steps, through this package and eagerly, in turns in one process.

    ``layer_*`` time forward and backward of the adapted layers alone; ``bare`` is their frozen
    linear part with no adapter, called plainly.
    """

    key: str
    label: str
    steps: int
    ours_ms: float
    eager_ms: float
    largest_loss_difference: float
    layers: int
    layer_ours_ms: float
    layer_eager_ms: float
    layer_bare_ms: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that is reported. ``settings`` and ``machine`` are flat and ready for JSON."""

    settings: Facts
    machine: Facts
    methods: list[MethodResult]
    comparison: Comparison | None


def standard_error(result: DemoResult) -> float:
    """Standard error of an accuracy of about 0.8, from the number of held-out snippets."""
    return math.sqrt(0.8 * 0.2 / int(result.settings["test_size"]))


def file_size(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1024:,.1f} KiB" if size < 1024**2 else f"{size / 1024**2:,.1f} MiB"


def build_table(result: DemoResult) -> Table:
    """The methods as rows, the eagerly run LoRA-XS under the one it was run beside."""
    table = Table(
        title="MiniLM-L6 judges movie-review snippets",
        box=box.SIMPLE_HEAD,
        padding=0,
        collapse_padding=True,
        caption_justify="left",
        caption=(
            "numbers: trained in the adapter, besides the classifier's "
            f"{result.methods[0].head_numbers}; accuracy: on {result.settings['test_size']} "
            f"held-out snippets (± {standard_error(result):.3f}); reloaded: the saved adapter on a "
            "fresh model, ✓ if every prediction is the same; ms/step: median; file: adapter and "
            "classifier with its metadata; SVD: all layers"
        ),
    )
    table.add_column("method", no_wrap=True)
    for name in ("numbers", "accuracy", "reloaded", "ms/step", "file", "SVD, s"):
        table.add_column(name, justify="right", no_wrap=True)
    comparison = result.comparison
    for row in result.methods:
        # Where eager steps were taken in turns with ours, both rows speak of those steps.
        beside = comparison if comparison is not None and comparison.key == row.key else None
        table.add_row(
            row.label,
            f"{row.adapter_numbers:,}",
            f"{row.accuracy:.4f}",
            f"{row.accuracy_reloaded:.4f} {'✓' if row.same_predictions else '✗'}",
            f"{row.step_ms if beside is None else beside.ours_ms:.1f}",
            file_size(row.file_bytes),
            f"{row.svd_seconds:.2f}" if row.kind == "lora-xs" else "–",
        )
        if beside is not None:
            eager = f"{beside.eager_ms:.1f}"
            numbers = f"{row.adapter_numbers:,}"
            table.add_row("  the same, eagerly", numbers, "–", "–", eager, "–", "–", style="dim")
    return table


def comparison_lines(comparison: Comparison) -> list[str]:
    """The comparison with eager PyTorch in words."""
    c = comparison
    return [
        f"{c.label}, the same {c.steps} training steps in turns: {c.ours_ms:.2f} ms with this "
        f"package, {c.eager_ms:.2f} ms eager: {c.eager_ms / c.ours_ms:.2f} × as fast; the losses "
        f"differ by at most {c.largest_loss_difference:.1e}.",
        f"Its {c.layers} layers alone, forward and backward: {c.layer_ours_ms:.2f} ms, "
        f"{c.layer_eager_ms:.2f} ms eager ({c.layer_eager_ms / c.layer_ours_ms:.2f} × as fast), "
        f"{c.layer_bare_ms:.2f} ms for the bare frozen linear layers "
        f"({c.layer_ours_ms / c.layer_bare_ms:.2f} × bare).",
    ]


def print_report(result: DemoResult, console: Console) -> None:
    """Print the table and the comparison."""
    console.print(build_table(result))
    if result.comparison is not None:
        for line in comparison_lines(result.comparison):
            console.print(line, highlight=False)


def write_json(result: DemoResult, directory: Path) -> Path:
    """Write all of the result to ``results.json``."""
    path = directory / JSON_NAME
    content = {
        "settings": dict(result.settings),
        "machine": dict(result.machine),
        "methods": [dataclasses.asdict(row) for row in result.methods],
        "comparison": None if result.comparison is None else dataclasses.asdict(result.comparison),
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def write_plot(result: DemoResult, directory: Path) -> Path:
    """Draw accuracy over the adapter's trained numbers to ``accuracy.png``.

    The numbers have a logarithmic axis, on which the classifier alone (no adapter) is a line.
    """
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    error = standard_error(result)
    for kind, label in LABELS.items():
        rows = [row for row in result.methods if row.kind == kind]
        if not rows:
            continue
        if kind == "head":
            axes.axhline(rows[0].accuracy, color="0.5", linestyle="--", label=label)
            continue
        numbers = [row.adapter_numbers for row in rows]
        heights = [row.accuracy for row in rows]
        axes.errorbar(
            numbers, heights, yerr=error, marker=MARKERS[kind], capsize=3, linewidth=1, label=label
        )
        for row in rows:
            axes.annotate(
                f"r = {row.rank}",
                (row.adapter_numbers, row.accuracy),
                textcoords="offset points",
                xytext=(6, 6),
            )
    if any(row.adapter_numbers for row in result.methods):
        axes.set_xscale("log")
    axes.set_xlabel("trained numbers in the adapter")
    axes.set_ylabel("accuracy on held-out snippets")
    axes.set_title("MiniLM-L6 on movie-review snippets (bars: one standard error)")
    axes.grid(alpha=0.3)
    axes.margins(x=0.12)
    axes.legend()
    path = directory / PLOT_NAME
    figure.savefig(path, dpi=150)
    return path
