"""examples/ablation.py: its bases, its learning rates, and whole runs on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

# The example is optional, and so are the libraries it imports.
# ruff: noqa: E402
for needed in ("matplotlib", "peft", "rich", "transformers"):
    pytest.importorskip(needed)

from examples import ablation
from examples import ablation_runs as runs
from loraxs_kernels.demo.model import Base
from tests.tiny_demo import synthetic_snippets, tiny_base

VARIANTS = {variant.key: variant for variant in runs.VARIANTS}
OPTIONS = runs.Options(
    ranks=(4, 16),
    seeds=2,
    snippets=96,
    epochs=1,
    tuning_snippets=48,
    validation_size=32,
    test_size=40,
    variants=("top", "random", "top-plain"),
)


@pytest.fixture(scope="module")
def tiny() -> Base:
    return tiny_base()


def task_of(options: runs.Options, base: Base) -> runs.Task:
    return runs.prepare(options, base, synthetic_snippets(260))


def store_of(options: runs.Options, base: Base, folder: Path) -> runs.Store:
    return runs.Store(folder / "ablation.json", runs.settings_of(options, base))


# -------------------------------------------------------------------------------------- the bases


@pytest.mark.parametrize("key", list(VARIANTS))
def test_bases_are_what_they_are_called(tiny: Base, key: str) -> None:
    variant, rank = VARIANTS[key], 4
    model = runs.adapt(tiny.build(0), variant, rank, seed=3)
    layers = runs.adapters(model)
    assert len(layers) == 8
    for layer in layers:
        U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
        first = {"top": 0, "middle": (len(S) - rank) // 2, "bottom": len(S) - rank}
        if variant.subspace != "random":
            part = slice(first[variant.subspace], first[variant.subspace] + rank)
            along = (layer.A @ Vh.mT)[:, part].abs()
            sigma = S[part] if variant.sigma == "A" else torch.ones(rank)
            torch.testing.assert_close(along, torch.diag(sigma), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(
                (U.mT @ layer.B)[part].abs(), torch.eye(rank), rtol=1e-3, atol=1e-4
            )
        elif variant.kaiming:
            n = layer.B.shape[0]
            assert 0.8 * rank**-0.5 < float(layer.A.abs().max()) <= rank**-0.5
            assert 0.8 * n**-0.5 < float(layer.B.abs().max()) <= n**-0.5
        else:
            scale = S[:rank].square() if variant.scaled_like_top else torch.ones(rank)
            torch.testing.assert_close(layer.A @ layer.A.mT, torch.diag(scale))
            torch.testing.assert_close(layer.B.mT @ layer.B, torch.eye(rank))


def test_random_bases_differ_from_layer_to_layer_and_seed_to_seed(tiny: Base) -> None:
    for key in ("random", "kaiming", "random-plain"):
        models = [runs.adapt(tiny.build(0), VARIANTS[key], 4, seed) for seed in (0, 0, 1)]
        first, same, other = (
            [layer.A for layer in runs.adapters(m) if layer.A.shape[1] == 32] for m in models
        )
        assert all(map(torch.equal, first, same))
        everything = [a / a.norm() for a in (*first, *other)]
        overlaps = torch.tensor(
            [[float((a * b).sum()) for b in everything] for a in everything]
        ).fill_diagonal_(0)
        assert overlaps.abs().max() < 0.9


def test_an_optimizer_step_moves_the_weight_equally_far(tiny: Base) -> None:
    """What the learning rates are divided by: a step of ±h in every entry of R moves a weight by
    h r times the size of the bases, on average over signs."""
    generator = torch.Generator().manual_seed(0)
    for key in ("top", "bottom", "kaiming", "random-plain"):
        model = runs.adapt(tiny.build(0), VARIANTS[key], 16, seed=0)
        moved = []
        for layer in runs.adapters(model):
            signs = torch.randint(0, 2, (200, 16, 16), generator=generator) * 2.0 - 1.0
            moves = layer.B @ signs @ layer.A
            moved.append(float(moves.square().sum((1, 2)).mean().sqrt()) / 16)
        expected = runs.size_of_bases(model)
        assert math.exp(sum(map(math.log, moved)) / len(moved)) == pytest.approx(expected, rel=0.03)


def test_learning_rates_follow_the_size_of_the_bases(tiny: Base) -> None:
    task = task_of(OPTIONS, tiny)
    cells = [runs.Cell(key, 16, 0, True) for key in ("top", "top-plain", "bottom")]
    top, plain, bottom = (runs.run_cell(cell, task, 1) for cell in cells)
    assert top.learning_rate == pytest.approx(8e-3)  # the demo's
    assert plain.size == pytest.approx(1.0, rel=1e-5)
    for outcome in (plain, bottom):
        product = outcome.learning_rate * outcome.size
        assert product == pytest.approx(top.learning_rate * top.size)


# -------------------------------------------------------------------------------------- whole runs


def test_text_is_apart(tiny: Base) -> None:
    seen: list[tuple[str, ...]] = []

    def encode(texts):
        seen.append(tuple(texts))
        return [[1] for _ in texts]

    task = task_of(OPTIONS, dataclasses.replace(tiny, encode=encode))
    sets = [set(texts) for texts in seen]
    assert sorted(map(len, sets)) == [32, 40, 96]
    assert len(set().union(*sets)) == 168
    assert (len(task.train), len(task.tuning)) == (96, 48)
    with pytest.raises(ValueError, match="train_size must be between"):
        task_of(dataclasses.replace(OPTIONS, snippets=1000), tiny)


def tuned(variant: str, step: int, loss: float) -> runs.Outcome:
    cell = runs.Cell(variant, 4, runs.TUNING_SEED, True, step)
    return runs.Outcome(cell, 0.5, loss, 1e-2, 1.0, 1.0)


@pytest.mark.parametrize(
    ("lowest", "tried"),
    [(1, [0, 1, 2]), (0, [0, 1, -1]), (-2, [0, 1, -1, -2, -3]), (9, [0, 1, 2, 3, 4])],
)
def test_search_for_a_learning_rate_brackets_the_best(lowest: int, tried: list[int]) -> None:
    options = dataclasses.replace(OPTIONS, ranks=(4,), variants=("top",))
    outcomes = [
        dataclasses.replace(
            tuned("x", step, 0.5), cell=runs.Cell("classifier", 0, 1000, True, step)
        )
        for step in (0, 1, -1)
    ]
    steps = []
    while cell := runs.next_to_tune(options, outcomes):
        assert (cell.variant, cell.rank, cell.tuning) == ("top", 4, True)
        steps.append(cell.step)
        outcomes.append(tuned("top", cell.step, abs(cell.step - lowest)))
    assert steps == tried
    best = runs.best_steps(options, outcomes)["top", 4]
    assert best == min(lowest, runs.MOST_STEPS)
    assert cell is None and runs.Cell("top", 4, 0, False, 2).multiplier == 9.0


def test_interrupted_runs_go_on_where_they_stopped(tiny: Base, tmp_path: Path) -> None:
    task = task_of(OPTIONS, tiny)
    notes: list[str] = []
    store = store_of(OPTIONS, tiny, tmp_path)
    assert not runs.run(OPTIONS, task, store, minutes=-1, note=notes.append)
    assert not notes and not store.path.exists()

    def stop_after_five(note: str) -> None:
        notes.append(note)
        if len(notes) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run(OPTIONS, task, store, minutes=9, note=stop_after_five)
    again = store_of(OPTIONS, tiny, tmp_path)
    assert again.outcomes == store.outcomes and len(again.outcomes) == 5
    notes.clear()
    assert runs.run(OPTIONS, task, again, minutes=9, note=notes.append)
    # classifier, top and random at 4 and 16, top-plain at 16; learning rates at 16 only
    judged = [cell for cell in again.outcomes if not cell.tuning]
    assert len(judged) == 6 * 2 and len(notes) == len(again.outcomes) - 5
    searched = {(cell.variant, cell.rank) for cell in again.outcomes if cell.tuning}
    assert searched == {("classifier", 0), ("top", 16), ("random", 16), ("top-plain", 16)}
    steps = {(c.variant, c.rank): c.step for c in judged}
    assert steps["top", 4] == steps["top", 16] and steps["random", 4] == steps["random", 16]
    everywhere = dataclasses.replace(OPTIONS, tune_every_rank=True)
    cell = runs.next_to_tune(everywhere, again.outcomes.values())
    assert cell is not None and (cell.variant, cell.rank, cell.step) == ("top", 4, 0)
    one_more = dataclasses.replace(OPTIONS, seeds=3)
    notes.clear()
    assert runs.run(
        one_more, task, store_of(one_more, tiny, tmp_path), minutes=9, note=notes.append
    )
    assert len(notes) == 6 and all("seed 2" in note for note in notes)
    with pytest.raises(ValueError, match=r"other settings.*'snippets': 96"):
        store_of(dataclasses.replace(OPTIONS, snippets=90), tiny, tmp_path)


def test_report_and_plot(tiny: Base, tmp_path: Path, capsys) -> None:
    options = dataclasses.replace(OPTIONS, ranks=(4,))
    store = store_of(options, tiny, tmp_path)
    scores = {runs.CLASSIFIER: 0.7, "top": 0.8, "random": 0.75, "top-plain": 0.9}
    for variant, rank in runs.groups(options):
        for step in (0, 1, 2):
            cell = runs.Cell(variant, rank, runs.TUNING_SEED, True, step)
            store.add(runs.Outcome(cell, 0.9, 0.5 + 0.1 * (step != 1), 1e-2, 1.0, 1.0))
            for seed in range(2):
                cell = runs.Cell(variant, rank, seed, False, step)
                score = scores[variant] + 0.02 * seed if step == 1 else 0.1
                store.add(runs.Outcome(cell, score, 0.25, 1e-2, 1.0, 1.0))
    for markdown in (False, True):
        ablation.report(options, store, tmp_path, markdown=markdown)
        lines = capsys.readouterr().out.splitlines()
        (row,) = [line for line in lines if "random orthonormal" in line]
        assert "0.7600 ± 0.0141" in row and "-0.0500 ± 0.0000" in row and "1.0e-02" in row
        assert "0.2500 ± 0.0000" in row
    assert (tmp_path / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    rows = {row.variant: row for row in ablation.rows_of(options, store.outcomes.values())}
    assert rows["top"].over_top == {} and rows["top"].multiplier == 3.0
    assert rows["top-plain"].over_top == pytest.approx({0: 0.1, 1: 0.1})


def test_command_line(tiny: Base, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ablation, "load_minilm", lambda: tiny)
    monkeypatch.setattr(ablation, "fetch_archive", lambda: tmp_path / "archive")
    monkeypatch.setattr(ablation, "read_snippets", lambda path: synthetic_snippets(400))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    out = tmp_path / "out"
    arguments = ["--quick", "--ranks", "4", "--variants", "top,bottom", "--out", str(out)]
    assert ablation.main(arguments) == 0
    said = capsys.readouterr().out
    assert "bottom, A = ΣVᵀ" in said and "classifier alone" in said
    content = json.loads((out / "ablation.json").read_text())
    judged = [row for row in content["outcomes"] if not row["cell"]["tuning"]]
    assert len(judged) == 3 and len(content["outcomes"]) >= 3 + 3 * 3
    assert content["settings"]["snippets"] == runs.QUICK.snippets
    assert ablation.main([*arguments, "--minutes", "0", "--seeds", "2"]) == 0
    assert "run the same command again" in capsys.readouterr().out
    assert ablation.main([*arguments, "--test-size", "390"]) == 1
    assert "train_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "4,0"], "'0'"),
        (["--variants", "top,sideways"], "sideways"),
        (["--seeds", "-1"], "--seeds"),
    ],
)
def test_bad_options(arguments: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        ablation.parse(arguments)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_options() -> None:
    options, args = ablation.parse(["--ranks", "4,8,16,32,64", "--snippets", "3000"])
    assert options.ranks == (4, 8, 16, 32, 64) and options.tuning_snippets == 1500
    assert args.out == Path("ablation-out")
    quick, args = ablation.parse(["--quick"])
    assert quick == runs.QUICK and args.out == Path("ablation-out/quick")
    # The variants without Σ are run at one rank only.
    plain = [g for g in runs.groups(options) if g[0].endswith("plain")]
    assert plain == [("top-plain", 16), ("bottom-plain", 16), ("random-plain", 16)]
