"""``svd-report`` on small files with known spectra, and the reading of model files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraxs_kernels import __main__, model_files, svd_report
from tests.svd.cases import with_spectrum


def energies() -> torch.Tensor:
    """Forty singular values whose first four hold half of the energy, exactly."""
    s = torch.cat([torch.full((4,), 3.0), torch.ones(36)])
    return s.double()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {
        f"layers.{i}.{name}.weight": with_spectrum(50, 40, energies(), generator).to(dtype)
        for i, (name, dtype) in enumerate((("q_proj", torch.float32), ("up_proj", torch.bfloat16)))
    }
    save_file(
        {
            **{name: t.contiguous() for name, t in tensors.items()},
            "embed_tokens.weight": torch.randn(90, 40),
            "norm.weight": torch.ones(40),
            "ids": torch.ones(9, 9, dtype=torch.int64),
            "conv.weight": torch.ones(4, 3, 3),
        },
        folder / "model-00001-of-00002.safetensors",
    )
    save_file(
        {"layers.2.o_proj.weight": 2 * torch.eye(30)}, folder / "model-00002-of-00002.safetensors"
    )
    (folder / "config.json").write_text("{}")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = __main__.main(["svd-report", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_report(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "spectra.png"
    status, out, _ = run(capsys, model, "--plot", plot, "--energy", "0.5")
    assert status == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("layers")}
    assert list(rows) == [
        "layers.0.q_proj.weight",
        "layers.1.up_proj.weight",
        "layers.2.o_proj.weight",
    ]
    _, shape, rank, *rest = rows["layers.0.q_proj.weight"]
    assert (shape, rank, rest[:4]) == ("50x40", "40", ["3"] * 4)
    # r = 4, 8, 16, 32; then the rank for 50 %, the certificate, the time.
    assert rest[4:8] == ["50.0%", "55.6%", "66.7%", "88.9%"]
    assert rest[8] == "4" and float(rest[9]) <= 1e-3 and float(rest[10]) > 0
    assert rows["layers.2.o_proj.weight"][1:4] == ["30x30", "30", "2"]
    assert "For 50% of the energy of all layers together: rank" in out
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 5000


def test_suggested_rank(model: Path) -> None:
    spectra = [svd_report.spectrum(m, 256) for m in model_files.matrices(model)]
    assert [s.values.shape[0] for s in spectra] == [40, 40, 30]
    for share in (0.1, 0.3, 0.5, 0.9, 1.0):
        needed = svd_report.rank_for(spectra, share)
        assert needed is not None
        total = sum(s.energy for s in spectra)
        held = [
            sum(float(s.values[:r].square().sum()) for s in spectra) for r in (needed - 1, needed)
        ]
        assert held[0] < share * total <= held[1] * (1 + 1e-6)
    few = [svd_report.spectrum(m, 3) for m in model_files.matrices(model)]
    assert svd_report.rank_for(few, 0.5) is None
    assert "more than the 3 directions" in svd_report.summary(few, 0.5)


def test_include_and_exclude(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, model, "--no-plot", "--include", "q_proj|embed", "--exclude", "")
    assert re.findall(r"^(\S+weight)", out, re.M) == [
        "embed_tokens.weight",
        "layers.0.q_proj.weight",
    ]
    assert not Path("svd-report.png").exists()


def test_one_file_is_enough(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, model / "model-00002-of-00002.safetensors", "--no-plot")
    assert re.findall(r"^(\S+weight)", out, re.M) == ["layers.2.o_proj.weight"]


def test_an_installed_package(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = model.parent / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    model.rename(package / "model")
    monkeypatch.setattr(sys, "path", [str(model.parent), *sys.path])
    status, out, _ = run(capsys, "carries-a-model", "--no-plot")
    assert status == 0 and out.count(".weight") == 3


def test_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    numbers = torch.randn(48, 64)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("blk.0.attn_q.weight", numbers.numpy())
    packed = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_k.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain, quantized = model_files.matrices(file)
    assert plain.shape == quantized.shape == (48, 64)
    assert torch.equal(plain.load(), numbers)
    torch.testing.assert_close(quantized.load(), numbers, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/place"], "model: /no/such/place is no file"),
        (["no_such_package"], "model: no_such_package"),
        (["{folder}"], "holds no"),
        (["{folder}/broken.safetensors"], "cannot be read"),
        (["{folder}/notes.txt"], "is not a .safetensors"),
        (["{model}", "--rank", "0"], "--rank: got 0"),
        (["{model}", "--energy", "1.5"], "--energy: got 1.5"),
        (["{model}", "--include", "("], "not a regular expression"),
        (["{model}", "--include", "nothing_like_it"], "let through"),
    ],
)
def test_wrong_arguments(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    folder = model.parent / "other"
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    broken = model.parent / "other" / "broken.safetensors"
    if "broken" in arguments[0]:
        broken.write_bytes(b"\x01" * 100)
    status, out, err = run(
        capsys, *(a.format(folder=folder, model=model) for a in arguments), "--no-plot"
    )
    assert status == 2 and message in err and out == ""


def test_a_weight_with_nan_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x.weight": torch.full((4, 4), float("nan"))}, model / "bad.safetensors")
    status, out, err = run(capsys, model, "--no-plot")
    assert status == 2 and "x.weight" in err and "NaN" in err and out == ""
