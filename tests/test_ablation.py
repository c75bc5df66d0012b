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
from loraxs_kernels.demo.model import Base
from tests.tiny_demo import synthetic_snippets, tiny_base

VARIANTS = {variant.key: variant for variant in ablation.VARIANTS}
OPTIONS = ablation.Options(
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


def task_of(options: ablation.Options, base: Base) -> ablation.Task:
    return ablation.prepare(options, base, synthetic_snippets(260))


def store_of(options: ablation.Options, base: Base, folder: Path) -> ablation.Store:
    return ablation.Store(folder / "ablation.json", ablation.settings_of(options, base))


# -------------------------------------------------------------------------------------- the bases


@pytest.mark.parametrize("key", list(VARIANTS))
def test_bases_are_what_they_are_called(tiny: Base, key: str) -> None:
    variant, rank = VARIANTS[key], 4
    model = ablation.adapt(tiny.build(0), variant, rank, seed=3)
    layers = ablation.adapters(model)
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
        models = [ablation.adapt(tiny.build(0), VARIANTS[key], 4, seed) for seed in (0, 0, 1)]
        first, same, other = (
            [layer.A for layer in ablation.adapters(m) if layer.A.shape[1] == 32] for m in models
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
        model = ablation.adapt(tiny.build(0), VARIANTS[key], 16, seed=0)
        moved = []
        for layer in ablation.adapters(model):
            signs = torch.randint(0, 2, (200, 16, 16), generator=generator) * 2.0 - 1.0
            moves = layer.B @ signs @ layer.A
            moved.append(float(moves.square().sum((1, 2)).mean().sqrt()) / 16)
        expected = ablation.size_of_bases(model)
        assert math.exp(sum(map(math.log, moved)) / len(moved)) == pytest.approx(expected, rel=0.03)


def test_learning_rates_follow_the_size_of_the_bases(tiny: Base) -> None:
    task = task_of(OPTIONS, tiny)
    cells = [ablation.Cell(key, 16, 0, True) for key in ("top", "top-plain", "bottom")]
    top, plain, bottom = (ablation.run_cell(cell, task, 1) for cell in cells)
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


def test_interrupted_runs_go_on_where_they_stopped(tiny: Base, tmp_path: Path) -> None:
    task = task_of(OPTIONS, tiny)
    notes: list[str] = []
    store = store_of(OPTIONS, tiny, tmp_path)
    assert not ablation.run(OPTIONS, task, store, minutes=-1, note=notes.append)
    assert not notes and not store.path.exists()

    def stop_after_five(note: str) -> None:
        notes.append(note)
        if len(notes) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablation.run(OPTIONS, task, store, minutes=9, note=stop_after_five)
    again = store_of(OPTIONS, tiny, tmp_path)
    assert again.outcomes == store.outcomes and len(again.outcomes) == 5
    notes.clear()
    assert ablation.run(OPTIONS, task, again, minutes=9, note=notes.append)
    # classifier, top and random at 4 and 16, top-plain at 16: six, × 3 rates, then × 2 seeds
    assert len(again.outcomes) == 6 * 3 + 6 * 2 and len(notes) == 30 - 5
    one_more = dataclasses.replace(OPTIONS, seeds=3)
    notes.clear()
    assert ablation.run(one_more, task, store_of(one_more, tiny, tmp_path), minutes=9,
                        note=notes.append)  # fmt: skip
    assert len(notes) == 6 and all("seed 2" in note for note in notes)
    with pytest.raises(ValueError, match=r"other settings.*'snippets': 96"):
        store_of(dataclasses.replace(OPTIONS, snippets=90), tiny, tmp_path)


def test_report_and_plot(tiny: Base, tmp_path: Path, capsys) -> None:
    options = dataclasses.replace(OPTIONS, ranks=(4,))
    store = store_of(options, tiny, tmp_path)
    scores = {ablation.CLASSIFIER: 0.7, "top": 0.8, "random": 0.75, "top-plain": 0.9}
    for variant, rank in ablation.groups(options):
        for multiplier in ablation.MULTIPLIERS:
            cell = ablation.Cell(variant, rank, ablation.TUNING_SEED, True, multiplier)
            tuned = 0.6 + 0.1 * (multiplier == 3.0)
            store.add(ablation.Outcome(cell, tuned, 1e-2, 1.0, 0.5, 1.0))
            for seed in range(2):
                cell = ablation.Cell(variant, rank, seed, False, multiplier)
                score = scores[variant] + 0.02 * seed if multiplier == 3.0 else 0.1
                store.add(ablation.Outcome(cell, score, 1e-2, 1.0, 0.5, 1.0))
    for markdown in (False, True):
        ablation.report(options, store, tmp_path, markdown=markdown)
        lines = {
            line.split("  ")[0].strip("| "): line for line in capsys.readouterr().out.split("\n")
        }
        row = next(line for key, line in lines.items() if key.startswith("random orthonormal"))
        assert "0.7600 ± 0.0141" in row and "-0.0500 ± 0.0000" in row and "1.0e-02" in row
    assert (tmp_path / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    rows = {row.variant: row for row in ablation.rows_of(options, store.outcomes.values())}
    assert rows["top"].over_top == {} and rows["top"].multiplier == 3.0
    assert rows["top-plain"].over_top == pytest.approx({0: 0.1, 1: 0.1})


def test_equally_good_rates_are_told_apart_by_the_loss() -> None:
    outcomes = [
        ablation.Outcome(ablation.Cell("top", 4, 1, True, m), 0.8, m, 1.0, loss, 1.0)
        for m, loss in ((1.0, 0.5), (2.0, 0.3), (3.0, 0.4))
    ]
    assert ablation.best_multipliers(outcomes) == {("top", 4): 2.0}


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
    assert len(content["outcomes"]) == 3 * 3 + 3
    assert content["settings"]["snippets"] == ablation.QUICK.snippets
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
    assert quick == ablation.QUICK and args.out == Path("ablation-out/quick")
    # The variants without Σ are run at one rank only.
    plain = [g for g in ablation.groups(options) if g[0].endswith("plain")]
    assert plain == [("top-plain", 16), ("random-plain", 16)]
