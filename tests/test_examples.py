"""Every example runs, does what it says, and passes its own checks."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def _run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _torchrun(script: str) -> str:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return _run(*command, str(EXAMPLES / script))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built")
@pytest.mark.parametrize("script", ["ddp.py", "fsdp.py"])
def test_training_on_two_processes(script: str) -> None:
    printed = _torchrun(script)
    first, last = map(float, re.findall(r"loss (\S+) -> (\S+)", printed)[0])
    assert 0 < last < first / 4, printed
    if script == "fsdp.py":
        loaded = float(re.findall(r"without FSDP: (\S+)", printed)[0])
        assert loaded < first / 4, printed


def _printed(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What an example prints; it raises if one of its own checks fails."""
    importlib.import_module(f"examples.{name}").main(list(arguments))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "library"),
    [("official", "peft"), ("peft_trainer", "peft"), ("eigentune_core", "eigentune")],
)
def test_training_through_another_library(
    name: str, library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(library)
    printed = _printed(name, capsys)
    losses = re.findall(r"loss (\S+) -> (\S+)", printed)
    assert len(losses) == (2 if library == "eigentune" else 1), printed
    for first, last in losses:
        assert 0 <= float(last) < float(first) / 2, printed
    assert "the same" in printed.splitlines()[-1]


def test_serving(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed("serving", capsys, "--requests", "24", "--tokens", "3")
    assert "24 requests x 3 tokens" in printed and "of 64 adapters" in printed
    assert float(re.findall(r"(\S+) ms for the batch", printed)[0]) > 0


def test_serving_notices_a_wrong_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = importlib.import_module("examples.serving")
    made = serving.lxk.AdapterBatch

    def rotated(ids: torch.Tensor, count: int) -> object:
        return made(torch.where(ids < 0, ids, (ids + 1) % count), count)

    monkeypatch.setattr(serving.lxk, "AdapterBatch", rotated)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        serving.main(["--requests", "4", "--tokens", "2"])


def test_the_trainer_loses_what_it_does_eagerly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same start, same batches: the losses are within the tolerance rule of a float64 run."""
    pytest.importorskip("peft")
    example = importlib.import_module("examples.peft_trainer")
    compare = example.peft_compare.compare
    found: dict[str, Any] = {}

    def kept(*args: Any, **options: Any) -> dict[str, Any]:
        found.update(compare(*args, **options))
        return found

    monkeypatch.setattr(example.peft_compare, "compare", kept)
    example.main(["--compare", "--float64", "--steps", "12"])
    losses = {name: torch.tensor(run.losses, dtype=torch.float64) for name, run in found.items()}
    assert set(losses) == {"ours", "eager", "float64"}
    assert all(len(run.losses) == len(run.seconds) == 12 for run in found.values())
    slack = 2 * torch.finfo(torch.float32).eps
    oracle.rule("loss", losses["float64"], losses["ours"], [losses["eager"]], slack)
    assert losses["ours"][:4].mean() > 1.1 * losses["ours"][-4:].mean(), "it learned something"
    layers = [m for m in found["ours"].model.modules() if type(m).__name__ == "LoRAXSLayer"]
    assert layers and not any("forward" in vars(layer) for layer in layers)
    eager = [m for m in found["eager"].model.modules() if type(m).__name__ == "LoRAXSLayer"]
    assert len(eager) == len(layers) and all("forward" in vars(layer) for layer in eager)
    printed = capsys.readouterr().out
    assert "largest difference of the two loss curves" in printed and "times as fast" in printed
