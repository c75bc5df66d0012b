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
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loraxs_kernels as lxk
from loraxs_kernels.demo import missing_requirements
from loraxs_kernels.demo.data import (
    Batch,
    DataError,
    Example,
    Snippet,
    fetch_archive,
    make_batches,
    read_snippets,
    split_snippets,
)
from loraxs_kernels.demo.methods import METHODS, TARGET_MODULES, Method, attach
from loraxs_kernels.demo.model import HEAD, Base, load_minilm
from loraxs_kernels.demo.training import Trainer, accuracy, predict

CPU = torch.device("cpu")
BATCH, JUDGE_BATCH = 16, 64
TUNING_SEED = 1000  # not one of the seeds that are judged
#: Learning rates tried, as multiples of the one that moves the weight as far as the demo's does.
MULTIPLIERS = (1 / 3, 1.0, 3.0)


# ----------------------------------------------------------------------------------- the variants


@dataclass(frozen=True)
class Variant:
    """A choice of bases.

    Attributes:
        subspace: which singular vectors, or "random" orthonormal ones; see ``lxk.LoRAXSConfig``.
        sigma: "A" scales the rows of A by the singular values, "none" leaves A and B orthonormal.
        scaled_like_top: random rows of A get the singular values of the top of the spectrum.
        kaiming: uniform random entries instead, as the official code draws them.
        all_ranks: whether it belongs to the main comparison, or is run at one rank only.
    """

    key: str
    label: str
    subspace: str
    sigma: str = "A"
    scaled_like_top: bool = False
    kaiming: bool = False
    all_ranks: bool = True


VARIANTS = (
    Variant("top", "top, A = ΣVᵀ (LoRA-XS)", "top"),
    Variant("middle", "middle, A = ΣVᵀ", "middle"),
    Variant("bottom", "bottom, A = ΣVᵀ", "bottom"),
    Variant("random", "random orthonormal, Σ of the top", "random", scaled_like_top=True),
    Variant("kaiming", "random entries (official code's)", "random", kaiming=True),
    Variant("top-plain", "top, without Σ", "top", "none", all_ranks=False),
    Variant("random-plain", "random orthonormal, without Σ", "random", "none", all_ranks=False),
)
PLAIN_RANK = 16  # of those that are run at one rank only, if it is among the ranks
CLASSIFIER = "classifier"  # trained alone: what the adapters have to beat


def adapt(model: nn.Module, variant: Variant, rank: int, seed: int) -> nn.Module:
    """Freeze the model but for its classifier, and put adapters with the variant's bases on it."""
    config = lxk.LoRAXSConfig(
        rank,
        target_modules=TARGET_MODULES,
        modules_to_save=[HEAD],
        subspace=variant.subspace,
        sigma=variant.sigma,
        seed=seed,
    )
    torch.manual_seed(seed)
    lxk.inject_lora_xs(model, config)
    for number, layer in enumerate(adapters(model)):
        if variant.subspace == "random":
            _draw(layer, variant, torch.Generator().manual_seed(1_000_003 * seed + number))
    return model


@torch.no_grad()
def _draw(layer: lxk.LoRAXSLinear, variant: Variant, generator: torch.Generator) -> None:
    """Random bases of a layer's own: a seed alone would give layers of one shape the same ones."""
    rank = layer.A.shape[0]
    if variant.kaiming:
        # kaiming_uniform_(a=sqrt(5)) of the factors [in, r] and [r, out]: bound 1 / sqrt(columns).
        for basis, columns in ((layer.A, rank), (layer.B, layer.B.shape[0])):
            basis.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        return
    layer.A.copy_(torch.linalg.qr(torch.randn(layer.A.mT.shape, generator=generator)).Q.mT)
    layer.B.copy_(torch.linalg.qr(torch.randn(layer.B.shape, generator=generator)).Q)
    if variant.scaled_like_top:
        layer.A.mul_(torch.linalg.svdvals(layer.weight)[:rank, None])


def adapters(model: nn.Module) -> list[lxk.LoRAXSLinear]:
    """The LoRA-XS layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, lxk.LoRAXSLinear)]


def size_of_bases(model: nn.Module) -> float:
    """‖A‖ ‖B‖ / r (Frobenius), geometric mean over the layers.

    An optimizer that moves every entry of R by the same step h, in whatever directions, changes a
    weight by about h r times this. So learning rates divided by it are comparable.
    """
    sizes = [float(x.A.norm() * x.B.norm()) / x.A.shape[0] for x in adapters(model)]
    return statistics.geometric_mean(sizes)


def reference_step(rank: int) -> float:
    """h r for the demo's learning rate: h = 8e-3 at r = 16, and as 1 / r at other ranks."""
    known = {m.rank: m.adapter_lr * m.rank for m in METHODS if m.kind == "lora-xs"}
    return known.get(rank, known[16])


# ------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Options:
    """What an ablation is made of."""

    ranks: tuple[int, ...] = (4, 16, 64)
    seeds: int = 3
    snippets: int = 1200
    epochs: int = 1
    tuning_snippets: int = 600
    validation_size: int = 500
    test_size: int = 1000
    variants: tuple[str, ...] = tuple(v.key for v in VARIANTS)
    threads: int = 2


QUICK = Options(
    ranks=(4, 16),
    seeds=1,
    snippets=96,
    tuning_snippets=32,
    validation_size=64,
    test_size=128,
    variants=("top", "bottom", "random"),
)


@dataclass(frozen=True)
class Cell:
    """One training run: tuning (judged on validation snippets) or not (judged on test snippets)."""

    variant: str
    rank: int
    seed: int
    tuning: bool
    multiplier: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a cell gave. ``size`` is that of the bases (:func:`size_of_bases`), or 0."""

    cell: Cell
    accuracy: float
    learning_rate: float
    size: float
    last_losses: float
    seconds: float


@dataclass(frozen=True)
class Task:
    """The text, tokenized."""

    base: Base
    train: list[Example]
    tuning: list[Example]
    validation: list[Batch]
    test: list[Batch]


def prepare(options: Options, base: Base, snippets: Sequence[Snippet]) -> Task:
    """Training, validation and test snippets; the test ones are those of the demo.

    Raises:
        ValueError: there are fewer snippets.
    """
    needed = options.snippets + options.validation_size
    split = split_snippets(snippets, options.test_size, needed)

    def encode(chosen: Sequence[Snippet]) -> list[Example]:
        tokens = base.encode([s.text for s in chosen])
        return [Example(t, s.label) for t, s in zip(tokens, chosen, strict=True)]

    def batches(examples: Sequence[Example]) -> list[Batch]:
        return make_batches(examples, JUDGE_BATCH, device=CPU, pad_id=base.pad_id)

    train = encode(split.train[: options.snippets])
    validation = encode(split.train[options.snippets :])
    tuning = train[: options.tuning_snippets]
    return Task(base, train, tuning, batches(validation), batches(encode(split.test)))


def run_cell(cell: Cell, task: Task, epochs: int) -> Outcome:
    """Train and judge once. The seed decides the classifier's start, the order of the text, R's
    start and random bases: cells of one seed differ in nothing else."""
    started = time.perf_counter()
    model: nn.Module = task.base.build(cell.seed)
    if cell.variant == CLASSIFIER:
        method = next(m for m in METHODS if m.kind == "head")
        model, _ = attach(model, method, cell.seed)  # type: ignore[arg-type]
        method = dataclasses.replace(method, head_lr=method.head_lr * cell.multiplier)
        rate, size = method.head_lr, 0.0
    else:
        variant = next(v for v in VARIANTS if v.key == cell.variant)
        adapt(model, variant, cell.rank, cell.seed)
        size = size_of_bases(model)
        rate = cell.multiplier * _demo_size(cell.rank, task) * reference_step(cell.rank)
        rate /= size * cell.rank
        method = Method(cell.variant, variant.label, "lora-xs", cell.rank, rate)
    examples = task.tuning if cell.tuning else task.train
    order = [
        batch
        for epoch in range(epochs)
        for batch in make_batches(
            examples, BATCH, device=CPU, pad_id=task.base.pad_id, seed=cell.seed + epoch
        )
    ]
    trainer = Trainer(model, method, len(order), CPU)
    for batch in order:
        trainer.step(batch)
    judged = task.validation if cell.tuning else task.test
    score = accuracy(predict(model, judged), judged)
    last = statistics.fmean(trainer.losses[-10:])
    return Outcome(cell, score, rate, size, last, time.perf_counter() - started)


_SIZES: dict[tuple[int, str], float] = {}


def _demo_size(rank: int, task: Task) -> float:
    """The size of the bases that the demo's learning rates belong to: the top, with Σ."""
    key = (rank, task.base.name)
    if key not in _SIZES:
        _SIZES[key] = size_of_bases(adapt(task.base.build(0), VARIANTS[0], rank, 0))
    return _SIZES[key]


def groups(options: Options) -> Iterator[tuple[str, int]]:
    """(variant, rank) of all that is compared; the classifier alone has rank 0."""
    yield CLASSIFIER, 0
    plain = PLAIN_RANK if PLAIN_RANK in options.ranks else options.ranks[0]
    for rank in options.ranks:
        for variant in VARIANTS:
            if variant.key in options.variants and (variant.all_ranks or rank == plain):
                yield variant.key, rank


def tuning_cells(options: Options) -> list[Cell]:
    """All runs that look for learning rates."""
    return [
        Cell(variant, rank, TUNING_SEED, True, multiplier)
        for variant, rank in groups(options)
        for multiplier in MULTIPLIERS
    ]


def judged_cells(options: Options, best: dict[tuple[str, int], float]) -> list[Cell]:
    """All runs that count, seed by seed, with the learning rates that were found."""
    return [
        Cell(variant, rank, seed, False, best[variant, rank])
        for seed in range(options.seeds)
        for variant, rank in groups(options)
    ]


def best_multipliers(outcomes: Iterable[Outcome]) -> dict[tuple[str, int], float]:
    """For each (variant, rank) the learning rate of the best accuracy while tuning; of equals the
    one with the lower loss at the end."""
    best: dict[tuple[str, int], Outcome] = {}
    for outcome in outcomes:
        key = (outcome.cell.variant, outcome.cell.rank)
        held = best.get(key)
        if outcome.cell.tuning and (held is None or _merit(outcome) > _merit(held)):
            best[key] = outcome
    return {key: outcome.cell.multiplier for key, outcome in best.items()}


def _merit(outcome: Outcome) -> tuple[float, float]:
    return outcome.accuracy, -outcome.last_losses


# ---------------------------------------------------------------------------------- kept results


class Store:
    """Outcomes in a JSON file, written anew after each.

    Raises:
        ValueError: the file belongs to other options.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.outcomes: dict[Cell, Outcome] = {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] != settings:
                raise ValueError(
                    f"{path} holds results of other settings, {content['settings']}: choose "
                    f"another --out, or delete it"
                )
            for row in content["outcomes"]:
                outcome = Outcome(Cell(**row.pop("cell")), **row)
                self.outcomes[outcome.cell] = outcome

    def add(self, outcome: Outcome) -> None:
        """Keep it, on disk too."""
        self.outcomes[outcome.cell] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(o) for o in self.outcomes.values()]
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"settings": self.settings, "outcomes": rows}, indent=1))
        os.replace(part, self.path)


def settings_of(options: Options, base: Base) -> dict[str, Any]:
    """What must agree for results to belong together; seeds, ranks and variants may be added."""
    names = ("snippets", "epochs", "tuning_snippets", "validation_size", "test_size")
    return {"model": base.name, **{name: getattr(options, name) for name in names}}


def run(
    options: Options, task: Task, store: Store, *, minutes: float, note: Callable[[str], None]
) -> bool:
    """Run what is not in the store yet; returns whether everything is there now."""
    deadline = time.monotonic() + 60 * minutes

    def work(cells: Sequence[Cell]) -> bool:
        missing = [cell for cell in cells if cell not in store.outcomes]
        for number, cell in enumerate(missing, 1):
            if time.monotonic() > deadline:
                return False
            outcome = run_cell(cell, task, options.epochs)
            store.add(outcome)
            kind = "tuning" if cell.tuning else f"seed {cell.seed}"
            note(
                f"{number}/{len(missing)} {kind} {cell.variant} r={cell.rank} "
                f"lr {outcome.learning_rate:.1e} (×{cell.multiplier:.2g}): "
                f"{outcome.accuracy:.4f}, {outcome.seconds:.0f} s"
            )
        return True

    return work(tuning_cells(options)) and work(
        judged_cells(options, best_multipliers(store.outcomes.values()))
    )


# ------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Row:
    """One (variant, rank): accuracies by seed, and how much better than the top with that seed."""

    variant: str
    rank: int
    multiplier: float
    learning_rate: float
    accuracies: dict[int, float]
    over_top: dict[int, float]


def rows_of(options: Options, outcomes: Iterable[Outcome]) -> list[Row]:
    """What is judged so far, group by group."""
    outcomes = list(outcomes)
    best = best_multipliers(outcomes)
    rows: dict[tuple[str, int], Row] = {}
    for key in groups(options):
        chosen = [
            o for o in outcomes
            if not o.cell.tuning and (o.cell.variant, o.cell.rank) == key
            and o.cell.multiplier == best.get(key) and o.cell.seed < options.seeds
        ]  # fmt: skip
        if not chosen:
            continue
        scores = {o.cell.seed: o.accuracy for o in chosen}
        top = rows[("top", key[1])].accuracies if ("top", key[1]) in rows else {}
        over = {s: scores[s] - top[s] for s in scores if s in top and key[0] != "top"}
        rate = statistics.fmean(o.learning_rate for o in chosen)
        rows[key] = Row(*key, best[key], rate, scores, over)
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
    head = ["bases", "r", "accuracy", "minus top", "seeds", "learning rate", "(× norm)"]
    lines = [head]
    for row in rows:
        lines.append(
            [
                labels[row.variant],
                str(row.rank or "–"),
                mean_and_spread(row.accuracies.values()),
                mean_and_spread(row.over_top.values(), signed=True),
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
    error = math.sqrt(0.8 * 0.2 / options.test_size)
    print(
        f"accuracy: mean ± standard deviation over seeds, on {options.test_size} snippets (the "
        f"choice of these alone gives ± {error:.3f}, to all alike)\nminus top: difference to the "
        "top of the spectrum with the same seed and rank"
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
