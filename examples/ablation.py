"""Where should the bases of LoRA-XS point? The paper's ablation, on the demo's task.

    python -m examples.ablation [--quick] [--minutes 9] [--markdown]

MiniLM-L6 is fine-tuned on movie-review snippets (model, text and training are those of
``python -m loraxs_kernels demo``) with bases from the top, the middle or the bottom of each
weight's spectrum, and with random ones. Every choice of bases gets its own learning rate, found on
snippets that are not judged later. Finished runs are kept in ``--out`` and skipped the next time,
so a run may be interrupted, or cut into pieces with ``--minutes``. What was found:
docs/experiments.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.ablation_runs import (
    CLASSIFIER,
    QUICK,
    VARIANTS,
    Options,
    Outcome,
    Store,
    best_steps,
    groups,
    prepare,
    run,
    settings_of,
)
from loraxs_kernels.demo import missing_requirements
from loraxs_kernels.demo.data import DataError, fetch_archive, read_snippets
from loraxs_kernels.demo.model import load_minilm

# ------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Row:
    """One (variant, rank): accuracies and losses by seed, and accuracy above the top's by seed."""

    variant: str
    rank: int
    multiplier: float
    learning_rate: float
    accuracies: dict[int, float]
    losses: dict[int, float]
    over_top: dict[int, float]


def rows_of(options: Options, outcomes: Iterable[Outcome]) -> list[Row]:
    """What is judged so far, group by group."""
    outcomes = list(outcomes)
    best = best_steps(options, outcomes)
    rows: dict[tuple[str, int], Row] = {}
    for key in groups(options):
        chosen = [
            o for o in outcomes
            if not o.cell.tuning and (o.cell.variant, o.cell.rank) == key
            and o.cell.step == best.get(key) and o.cell.seed < options.seeds
        ]  # fmt: skip
        if not chosen:
            continue
        scores = {o.cell.seed: o.accuracy for o in chosen}
        top = rows[("top", key[1])].accuracies if ("top", key[1]) in rows else {}
        over = {s: scores[s] - top[s] for s in scores if s in top and key[0] != "top"}
        losses = {o.cell.seed: o.loss for o in chosen}
        rate = statistics.fmean(o.learning_rate for o in chosen)
        rows[key] = Row(*key, chosen[0].cell.multiplier, rate, scores, losses, over)
    return list(rows.values())


def mean_and_spread(values: Iterable[float], *, signed: bool = False) -> str:
    """``0.812 ± 0.004``: mean and standard deviation over the seeds."""
    numbers = list(values)
    if not numbers:
        return "–"
    mean = f"{statistics.fmean(numbers):{'+' if signed else ''}.4f}"
    return mean if len(numbers) < 2 else f"{mean} ± {statistics.stdev(numbers):.4f}"


def table(rows: Sequence[Row], *, markdown: bool) -> str:
    """The rows for a terminal or for a document."""
    labels = {v.key: v.label for v in VARIANTS} | {CLASSIFIER: "classifier alone"}
    head = ["bases", "r", "accuracy", "minus top", "loss", "seeds", "learning rate", "× usual"]
    lines = [head]
    for row in rows:
        lines.append(
            [
                labels[row.variant],
                str(row.rank or "–"),
                mean_and_spread(row.accuracies.values()),
                mean_and_spread(row.over_top.values(), signed=True),
                mean_and_spread(row.losses.values()),
                str(len(row.accuracies)),
                f"{row.learning_rate:.1e}",
                f"{row.multiplier:.2g}",
            ]
        )
    if markdown:
        lines.insert(1, ["---"] * len(head))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def plot(rows: Sequence[Row], path: Path, test_size: int) -> None:
    """Accuracy over the rank, a line for each choice of bases; bars: standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for number, variant in enumerate(VARIANTS):
        chosen = [row for row in rows if row.variant == variant.key]
        if not chosen:
            continue
        means = [statistics.fmean(row.accuracies.values()) for row in chosen]
        spread = [
            statistics.stdev(row.accuracies.values()) if len(row.accuracies) > 1 else 0.0
            for row in chosen
        ]
        # Side by side, so that bars do not hide each other.
        ranks = [row.rank * 1.03 ** (number - 3) for row in chosen]
        axes.errorbar(ranks, means, yerr=spread, marker="o", capsize=3, label=variant.label)
    for row in rows:
        if row.variant == CLASSIFIER:
            mean = statistics.fmean(row.accuracies.values())
            axes.axhline(mean, color="0.5", linestyle="--", label="classifier alone")
    axes.set_xscale("log", base=2)
    ticks = sorted({row.rank for row in rows if row.rank})
    axes.set_xticks(ticks, [str(rank) for rank in ticks])
    axes.set(xlabel="rank", ylabel=f"accuracy on {test_size} held-out snippets")
    axes.set_title("LoRA-XS on MiniLM-L6: where the bases come from")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


# ----------------------------------------------------------------------------------- command line


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of at least 1")
    return int(text)


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(_positive(item) for item in text.split(","))


def _variants(text: str) -> tuple[str, ...]:
    known = [v.key for v in VARIANTS]
    chosen = tuple(text.split(","))
    wrong = [key for key in chosen if key not in known]
    if wrong:
        raise argparse.ArgumentTypeError(f"got {wrong}, expected some of {', '.join(known)}")
    return chosen


def parse(arguments: Sequence[str] | None) -> tuple[Options, argparse.Namespace]:
    """Options, and what does not change results."""
    parser = argparse.ArgumentParser(prog="python -m examples.ablation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny run that shows that all works")
    add("--ranks", type=_ranks, help="default 4,16,64; 4,8,16,32,64 for finer steps")
    add("--seeds", type=_positive, help=f"default {Options.seeds}")
    add("--snippets", type=_positive, help=f"to train on, default {Options.snippets}")
    add("--epochs", type=_positive, help=f"default {Options.epochs}")
    add("--tuning-snippets", type=_positive, help="to train on while tuning (default: half)")
    add("--test-size", type=_positive, help=f"default {Options.test_size}")
    add("--variants", type=_variants, help="some of " + ",".join(v.key for v in VARIANTS))
    add("--tune-every-rank", action="store_true", default=None, help="not at r = 16 alone")
    add("--threads", type=_positive, help=f"default {Options.threads}")
    add("--minutes", type=float, default=math.inf, help="begin no run after so long")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--out", type=Path, help="default ablation-out, with --quick ablation-out/quick")
    args = parser.parse_args(arguments)
    base = QUICK if args.quick else Options()
    names = [field.name for field in dataclasses.fields(Options)]
    given = {n: getattr(args, n) for n in names if getattr(args, n, None) is not None}
    if args.snippets and not args.tuning_snippets:
        given["tuning_snippets"] = max(1, args.snippets // 2)
    args.out = args.out or Path("ablation-out", "quick" if args.quick else "")
    return dataclasses.replace(base, **given), args


def report(options: Options, store: Store, out: Path, *, markdown: bool) -> None:
    """Print the table, draw the plot."""
    rows = rows_of(options, store.outcomes.values())
    if not rows:
        return
    print(f"\n{table(rows, markdown=markdown)}\n")
    error, n = math.sqrt(0.8 * 0.2 / options.test_size), options.test_size
    print(
        f"accuracy, loss: mean ± standard deviation over seeds, on {n} snippets (the "
        f"choice of these alone gives ± {error:.3f}, to all alike)\nminus top: difference to the "
        "top of the spectrum with the same seed and rank\n× usual: the learning rate over the one "
        "that moves the weights as far as the demo's does"
    )
    plot(rows, out / "ablation.png", options.test_size)
    print(f"written: {store.path}, {out / 'ablation.png'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ablation; 0 if it is complete or was stopped by ``--minutes``, 1 after an error."""
    options, args = parse(arguments)
    missing = missing_requirements()
    if missing:
        print(f"needs {', '.join(missing)}: pip install 'loraxs_kernels[demo]'", file=sys.stderr)
        return 1
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(options.threads)
    try:
        base = load_minilm()
        snippets = read_snippets(fetch_archive())
        task = prepare(options, base, snippets)
        store = Store(args.out / "ablation.json", settings_of(options, base))
    except (DataError, OSError, ValueError) as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 1
    done = run(options, task, store, minutes=args.minutes, note=lambda s: print(s, flush=True))
    report(options, store, args.out, markdown=args.markdown)
    if not done:
        print(f"{args.minutes:g} minutes are over: run the same command again to go on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
