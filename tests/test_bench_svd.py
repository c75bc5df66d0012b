"""The measures of ``bench_svd`` where the answer is known, and the command on tiny matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

# The benchmark is optional, and so are the libraries it imports.
# ruff: noqa: E402
for needed in ("matplotlib", "scipy", "sklearn", "threadpoolctl"):
    pytest.importorskip(needed)

from bench import (
    bench_svd,
    common,
    svd_contenders,
    svd_matrices,
    svd_measure,
    svd_metrics,
    svd_report,
)
from bench.svd_metrics import Accuracy, Triplets, Truth

DOUBLE = torch.float64


@pytest.fixture
def command(monkeypatch) -> Iterator[None]:
    """For tests of the whole command: no pauses, and the number of threads is put back."""
    monkeypatch.setattr(svd_measure, "PAUSE_S", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def orthonormal(n: int, k: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=g, dtype=DOUBLE)).Q


def matrix_of(s: Tensor, m: int, n: int) -> tuple[Tensor, Truth]:
    """A matrix with singular values ``s``, and its triplets."""
    u, v = orthonormal(m, len(s), 1), orthonormal(n, len(s), 2)
    return (u * s) @ v.mT, Truth(s, v, u)


def top(truth: Truth, rank: int) -> Triplets:
    return Triplets(truth.u[:, :rank], truth.s[:rank], truth.v[:, :rank].mT)


# ----------------------------------------------------------------------------------- the measures


def test_the_truth_itself_has_no_error():
    w, truth = matrix_of(torch.arange(9, 0, -1).double(), 30, 20)
    got = svd_metrics.accuracy(w, truth, top(truth, 4))
    assert max(vars(got).values()) < 1e-12


@pytest.mark.parametrize("side", ["u", "v"])
@pytest.mark.parametrize("angle", [1e-6, 1e-3, 0.3, math.pi / 2])
def test_one_vector_turned_out_of_the_top(side: str, angle: float) -> None:
    """The last vector of r = 3 turned by an angle towards the fourth: everything is known."""
    s = torch.tensor([4.0, 3.0, 2.0, 1.5, 0.5], dtype=DOUBLE)
    w, truth = matrix_of(s, 12, 9)
    vectors = {"u": truth.u[:, :3].clone(), "v": truth.v[:, :3].clone()}
    true = {"u": truth.u, "v": truth.v}[side]
    vectors[side][:, 2] = math.cos(angle) * true[:, 2] + math.sin(angle) * true[:, 3]
    got = svd_metrics.accuracy(w, truth, Triplets(vectors["u"], s[:3], vectors["v"].mT))
    sine = math.sin(angle)
    assert got.pve == pytest.approx(sine**2 * (4 - 2.25) / 2.25, rel=1e-3, abs=1e-14)
    assert got.sine == pytest.approx(sine / math.sqrt(3), rel=1e-6)
    assert got.value_error == 0 and got.orthogonality < 1e-12


def test_value_error_and_orthogonality():
    s = torch.tensor([4.0, 2.0, 1.0], dtype=DOUBLE)
    w, truth = matrix_of(s, 6, 5)
    found = Triplets(truth.u[:, :2], torch.tensor([4.0, 2.02]), truth.v[:, :2].mT * 1.01)
    got = svd_metrics.accuracy(w, truth, found)
    assert got.value_error == pytest.approx(0.01, rel=1e-5)
    assert got.orthogonality == pytest.approx(1.01**2 - 1)
    # Longer vectors are no closer: the error counts in both directions.
    assert got.pve == pytest.approx(16 * (1.01**2 - 1))
    assert got.sine < 1e-12


def test_sine_is_that_of_the_true_vectors_whatever_the_basis():
    basis = orthonormal(10, 10, 3)
    skewed = basis[:, :3] @ torch.tensor([[1.0, 5, 0], [0, 0.1, 2], [0, 0, 3]], dtype=DOUBLE)
    assert svd_metrics.rms_sine(basis[:, :3], skewed) < 1e-12
    assert svd_metrics.rms_sine(basis[:, 3:6], skewed) == pytest.approx(1.0)
    assert svd_metrics.rms_sine(basis[:, 2:4], skewed) == pytest.approx(math.sqrt(0.5))


def test_pve_without_anything_beyond_the_rank():
    w, truth = matrix_of(torch.tensor([2.0, 1.0], dtype=DOUBLE), 2, 2)
    wrong = Triplets(truth.u, truth.s, truth.v.flip(-1).mT)
    got = svd_metrics.accuracy(w, truth, wrong)
    assert got.pve == pytest.approx(3.0 / (4.0 * svd_metrics.EPS))


def test_accuracy_refuses_what_does_not_fit():
    w, truth = matrix_of(torch.tensor([3.0, 2.0, 1.0], dtype=DOUBLE), 5, 4)
    with pytest.raises(ValueError, match="truth: got 2 triplets, expected at least 3"):
        svd_metrics.accuracy(w, Truth(truth.s[:2], truth.v[:, :2], truth.u[:, :2]), top(truth, 2))
    with pytest.raises(ValueError, match="found: got U"):
        svd_metrics.accuracy(w.mT, truth, top(truth, 2))


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (7, 7), (1, 5)])
def test_truth_agrees_with_lapack(shape: tuple[int, int], tmp_path: Path) -> None:
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    k = min(6, *shape)
    for _ in range(2):  # made, then read
        truth = svd_metrics.cached_exact(w, k, tmp_path)
        torch.testing.assert_close(truth.s, s[:k], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close((truth.v.mT @ vh[:k].mT).abs(), torch.eye(k, dtype=DOUBLE))
        torch.testing.assert_close((truth.u.mT @ u[:, :k]).abs(), torch.eye(k, dtype=DOUBLE))
        signs = (truth.u.mT @ w.double() @ truth.v).diagonal()
        torch.testing.assert_close(signs, s[:k])
    assert len(list(tmp_path.iterdir())) == 1


def test_kept_truth_is_made_anew_when_damaged_or_too_short(tmp_path: Path) -> None:
    w = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    noted: list[str] = []
    svd_metrics.cached_exact(w, 3, tmp_path, noted.append)
    assert len(svd_metrics.cached_exact(w, 5, tmp_path, noted.append).s) == 5
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert not noted
    truth = svd_metrics.cached_exact(w, 5, tmp_path, noted.append)
    assert len(noted) == 1 and "damaged" in noted[0]
    torch.testing.assert_close(truth.s, torch.linalg.svdvals(w.double())[:5])
    svd_metrics.cached_exact(w + 1, 5, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


# ----------------------------------------------------------------------------------- the matrices


def test_synthetic_matrix_has_its_spectrum():
    w = svd_matrices.synthetic(60, "power")
    expected = torch.arange(1, 61).double() ** -0.3
    torch.testing.assert_close(torch.linalg.svdvals(w.double()), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="spectrum: got 'odd'"):
        svd_matrices.singular_values("odd", 8)


def test_stretched_spectrum_keeps_the_top_and_the_range():
    s = 3.0 * torch.arange(1, 101).double() ** -0.5
    got = svd_matrices.stretched(s, 700, kept=20)
    torch.testing.assert_close(got[:20], s[:20] / 3.0)
    assert len(got) == 700 and bool((got.diff() < 0).all())
    assert got[-1] == pytest.approx(float(s[-1]) / 3.0)


# ---------------------------------------------------------------------------------- the contenders


@pytest.mark.parametrize("contender", svd_contenders.contenders(4), ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [(150, 90), (90, 150)])
def test_contenders_find_a_clear_subspace(contender, shape) -> None:
    s = torch.cat([torch.tensor([9.0, 8, 7, 6]), torch.full((30,), 0.5)]).double()
    w, truth = matrix_of(s, *shape)
    found = contender.run(w.float().contiguous(), 4, 0)
    got = svd_metrics.accuracy(w, truth, found)
    # Rounding in single precision, some eps · 9², is measured against 0.5².
    assert got.pve < 1e-2 and got.value_error < 1e-5 and got.sine < 1e-3
    assert got.orthogonality < 1e-4


# -------------------------------------------------------------------------------------- the report


def measured(name: str, seconds: float, *pves: float, ours: bool = False) -> svd_measure.Measured:
    accuracies = tuple(Accuracy(pve, pve, pve, 0.0) for pve in pves)
    return svd_measure.Measured(name, ours, seconds, 1, accuracies)


def job(*rows: svd_measure.Measured, size: int = 0) -> svd_measure.Result:
    name = "SmolLM2-135M" if size == 0 else f"{size}² flat"
    return svd_measure.Result(name, 16, {m.name: m for m in rows}, size, "flat", 2)


def test_bar_takes_the_fastest_setting_that_is_accurate_enough():
    result = job(
        measured(svd_contenders.LOWRANK_16, 1.0, 1e-2, 3e-2),
        measured("loose", 0.05, 9e-3, 4e-2, ours=True),  # the median would do, the worst does not
        measured("good", 0.1, 9e-3, 2e-2, ours=True),
        measured("better", 0.2, 1e-5, 1e-4, ours=True),
    )
    line = svd_report.Demand(svd_contenders.LOWRANK_16, 8.0).judge(result)
    assert (line.setting, line.met) == ("good", True) and line.ratio == pytest.approx(10.0)
    line = svd_report.Demand(svd_contenders.LOWRANK_16, 8.0, at_most=1e-3).judge(result)
    assert (line.setting, line.met) == ("better", False) and line.ratio == pytest.approx(5.0)
    line = svd_report.Demand(svd_contenders.LOWRANK_16, 8.0, share=1e-6).judge(result)
    assert (line.setting, line.ratio, line.met) == ("none", None, False)
    assert svd_report.Demand(svd_contenders.ARPACK, 2.0).judge(result).met is None


def test_bar_has_every_demand_and_the_worst_spectrum():
    slow, fast = (
        job(
            measured(svd_contenders.ARPACK, seconds, 1e-7),
            measured("ours", 1.0, 1e-6, ours=True),
            size=2048,
        )
        for seconds in (1.5, 9.0)
    )
    model = job(measured(svd_contenders.DEFAULT, 1.0, 1e-6, 2e-3, ours=True))
    lines = svd_report.bar([fast, slow, model])
    arpack = [x for x in lines if x.against == svd_contenders.ARPACK and "2048" in x.job]
    assert [(x.ratio, x.met) for x in arpack] == [(1.5, False), (None, None)]
    assert lines[-1].met is False and "every layer" in lines[-1].demand
    assert len(lines) == 4 * 4 + 2 + 3
    text = svd_report.bar_text(lines)
    assert "NO" in text and "not run" in text and "2.0e-03" in text
    table = svd_report.markdown([model], lines).splitlines()
    assert {line.count("|") for line in table[: len(lines) + 2]} == {9}


def test_others_on_the_processors(monkeypatch) -> None:
    # All processors together, busy, this process: 100 s passed, 60 busy, 20 of them ours.
    readings = iter([(1000.0, 500.0, 10.0), (1100.0, 560.0, 30.0), (1100.0, 522.0, 30.0)])
    monkeypatch.setattr(common.Others, "_read", lambda *_: next(readings))
    others = common.Others()
    assert others.share() == pytest.approx(0.4)
    assert others.sentence() == "others used 2% of the processors meanwhile"
    monkeypatch.setattr(common.Others, "_read", lambda *_: (1100.0, 560.0, 30.0))
    assert others.sentence().startswith("WARNING: others used 40% of the processors")
    monkeypatch.setattr(common.Others, "_read", lambda *_: None)
    assert math.isnan(others.share()) and others.sentence() == ""


# ---------------------------------------------------------------------------------------- the whole


def test_command_on_a_tiny_matrix(command, tmp_path: Path, capsys) -> None:
    sizes = ["--sizes", "160", "--ranks", "4,8", "--models", "none", "--case-seconds", "0.01"]
    bench_svd.main(["--quick", *sizes, "--markdown", "--out", str(tmp_path), "--threads", "1"])
    out = capsys.readouterr().out
    assert "the project's bar" in out and svd_contenders.OFFICIAL in out and "| against |" in out
    content = json.loads((tmp_path / "svd.json").read_text())
    assert [(r["size"], r["rank"]) for r in content["results"]] == [(160, 4), (160, 8)]
    for result in content["results"]:
        names = [c.name for c in svd_contenders.contenders(result["rank"])]
        assert list(result["measured"]) == names
        exact = result["measured"][svd_contenders.LAPACK]["accuracies"]
        assert max(a["pve"] for a in exact) < 1e-4
        default = result["measured"][svd_contenders.DEFAULT]["accuracies"]
        assert len(default) == svd_measure.SEEDS and max(a["pve"] for a in default) <= 1e-3
    assert (tmp_path / "svd.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((tmp_path / "truth").iterdir())) == 1


def test_models_are_timed_over_all_layers(command, tmp_path: Path, monkeypatch, capsys) -> None:
    g = torch.Generator().manual_seed(0)
    layers = [(f"layer {i}", torch.randn(40, 30 + i, generator=g)) for i in range(3)]
    monkeypatch.setitem(svd_matrices.MODELS, "minilm", lambda: iter(layers))
    # Two threads on tiny matrices wait for each other without end where others compute too.
    peers = [c for c in svd_contenders.PEERS if c.name == svd_contenders.LOWRANK_16]
    few = (*peers, *svd_contenders.OURS[2:4])
    monkeypatch.setattr(bench_svd, "contenders", lambda rank: few)
    monkeypatch.setattr(bench_svd, "cut_short", lambda rank: ())
    monkeypatch.setattr(bench_svd, "OURS", svd_contenders.OURS[:3])
    arguments = ["--sizes", "none", "--models", "minilm", "--model-ranks", "4", "--passes", "1"]
    bench_svd.main([*arguments, "--out", str(tmp_path)])
    (result,) = json.loads((tmp_path / "svd.json").read_text())["results"]
    assert result["layers"] == 3 and result["job"] == "MiniLM-L6"
    rows = result["measured"]
    whole = "ours, all factors of the model"
    assert rows[whole]["ours"] and rows[f"{svd_contenders.DEFAULT}, layers at once"]["ours"]
    assert all(len(row["accuracies"]) == 3 and row["seconds"] > 0 for row in rows.values())
    # The same computation, with fewer threads.
    pairs = zip(rows[whole]["accuracies"], rows[svd_contenders.DEFAULT]["accuracies"], strict=True)
    assert all(a["value_error"] < 1e-4 and b["value_error"] < 1e-4 for a, b in pairs)
    assert "every layer" in capsys.readouterr().out


def test_no_job_starts_after_the_time_is_over(command, tmp_path: Path, capsys) -> None:
    bench_svd.main(["--minutes", "0", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "left out, since 0 minutes are over" in out and "4096² flat r=16" in out
    assert json.loads((tmp_path / "svd.json").read_text())["results"] == []


def test_openblas_variables_are_found():
    environment = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS": "1", "PATH": "/bin"}
    assert bench_svd.openblas_variables(environment) == {"OPENBLAS_CORETYPE": "Haswell"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quick", "--full"], "exclude each other"),
        (["--ranks", "65"], "at most 64"),
        (["--models", "bert"], "'bert'"),
        (["--sizes", "12,x"], "positive numbers"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_bad_options(arguments: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        bench_svd.main(arguments)
    assert caught.value.code == 2 and said in capsys.readouterr().err
