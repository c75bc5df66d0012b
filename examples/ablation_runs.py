"""The runs behind ``examples.ablation``: bases, learning rates, training, kept results.

Model, text and training are those of ``loraxs_kernels.demo``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import loraxs_kernels as lxk
from loraxs_kernels.demo.data import Batch, Example, Snippet, make_batches, split_snippets
from loraxs_kernels.demo.methods import METHODS, TARGET_MODULES, Method, attach
from loraxs_kernels.demo.model import HEAD, Base
from loraxs_kernels.demo.training import Trainer, accuracy, predict

CPU = torch.device("cpu")
BATCH, JUDGE_BATCH = 16, 64
HEAD_LR = 1e-2  # of the classifier beside an adapter: ten times the demo's, whose runs are longer
TUNING_SEED = 1000  # not one of the seeds that are judged
#: Learning rates are tried in steps of this factor, beginning with the one that moves the weights
#: as far as the demo's does, until the best has a worse one on either side; at most so many steps.
FACTOR, MOST_STEPS = 3.0, 4


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
    Variant("bottom-plain", "bottom, without Σ", "bottom", "none", all_ranks=False),
    Variant("random-plain", "random orthonormal, without Σ", "random", "none", all_ranks=False),
)
#: The rank at which learning rates are searched, and of variants that are run at one rank only; if
#: it is not among the ranks, the first of them.
MAIN_RANK = 16
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
    snippets: int = 1000
    epochs: int = 1
    tuning_snippets: int = 500
    validation_size: int = 500
    test_size: int = 1000
    variants: tuple[str, ...] = tuple(v.key for v in VARIANTS)
    threads: int = 2
    tune_every_rank: bool = False


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
    """One training run: tuning (judged on validation snippets) or not (judged on test snippets).

    ``step``: of the learning rate, see ``FACTOR``.
    """

    variant: str
    rank: int
    seed: int
    tuning: bool
    step: int = 0

    @property
    def multiplier(self) -> float:
        """What the learning rate is multiplied by."""
        return FACTOR**self.step


@dataclass(frozen=True)
class Outcome:
    """What a cell gave.

    ``accuracy`` and ``loss`` (mean cross-entropy) are those of the snippets that judge it;
    ``size`` is that of the bases (:func:`size_of_bases`), or 0.
    """

    cell: Cell
    accuracy: float
    loss: float
    learning_rate: float
    size: float
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
        method = Method(cell.variant, variant.label, "lora-xs", cell.rank, rate, HEAD_LR)
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
    scores = predict(model, judged)
    loss = F.cross_entropy(scores, torch.cat([batch.labels for batch in judged]))
    seconds = time.perf_counter() - started
    return Outcome(cell, accuracy(scores, judged), loss.item(), rate, size, seconds)


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
    for rank in options.ranks:
        for variant in VARIANTS:
            everywhere = variant.all_ranks or rank == main_rank(options)
            if variant.key in options.variants and everywhere:
                yield variant.key, rank


def main_rank(options: Options) -> int:
    """See ``MAIN_RANK``."""
    return MAIN_RANK if MAIN_RANK in options.ranks else options.ranks[0]


def tuned_rank(options: Options, rank: int) -> int:
    """The rank whose search gives the learning rate for ``rank``.

    The reference, h r times the size of the bases, already takes the rank into account.
    """
    return rank if options.tune_every_rank or rank == 0 else main_rank(options)


def next_to_tune(options: Options, outcomes: Iterable[Outcome]) -> Cell | None:
    """The next run in the search for learning rates; None when all are found.

    Each search goes on in the direction in which the validation loss falls.
    """
    losses: dict[tuple[str, int], dict[int, float]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        if cell.tuning:
            losses.setdefault((cell.variant, cell.rank), {})[cell.step] = outcome.loss
    for key in groups(options):
        if key[1] != tuned_rank(options, key[1]):
            continue
        seen = losses.get(key, {})
        missing = [step for step in (0, 1) if step not in seen]
        if not missing:
            best = min(seen, key=lambda step: seen[step])
            around = (best - 1, best + 1)
            missing = [step for step in around if step not in seen and abs(step) <= MOST_STEPS]
        if missing:
            return Cell(*key, TUNING_SEED, True, missing[0])
    return None


def best_steps(options: Options, outcomes: Iterable[Outcome]) -> dict[tuple[str, int], int]:
    """For each (variant, rank) the step of the learning rate with the lowest validation loss, as
    far as it was searched."""
    best: dict[tuple[str, int], Outcome] = {}
    for outcome in outcomes:
        key = (outcome.cell.variant, outcome.cell.rank)
        if outcome.cell.tuning and (key not in best or outcome.loss < best[key].loss):
            best[key] = outcome
    asked = {key: (key[0], tuned_rank(options, key[1])) for key in groups(options)}
    return {key: best[at].cell.step for key, at in asked.items() if at in best}


def judged_cells(options: Options, best: dict[tuple[str, int], int]) -> list[Cell]:
    """All runs that count, seed by seed, with the learning rates that were found."""
    return [
        Cell(variant, rank, seed, False, best[variant, rank])
        for seed in range(options.seeds)
        for variant, rank in groups(options)
    ]


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

    def work(cell: Cell) -> None:
        outcome = run_cell(cell, task, options.epochs)
        store.add(outcome)
        kind = "tuning" if cell.tuning else f"seed {cell.seed}"
        note(
            f"{kind} {cell.variant} r={cell.rank} lr {outcome.learning_rate:.1e} "
            f"(×{cell.multiplier:.2g}): accuracy {outcome.accuracy:.4f}, "
            f"loss {outcome.loss:.4f}, {outcome.seconds:.0f} s"
        )

    while cell := next_to_tune(options, store.outcomes.values()):
        if time.monotonic() > deadline:
            return False
        work(cell)
    for cell in judged_cells(options, best_steps(options, store.outcomes.values())):
        if cell not in store.outcomes:
            if time.monotonic() > deadline:
                return False
            work(cell)
    return True
