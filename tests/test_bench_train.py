"""``bench_train`` on a tiny model: the methods agree, sizes and memory are what they should be."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# The benchmark is optional, and so are the libraries it imports.
# ruff: noqa: E402
for needed in ("eigentune", "peft", "scipy", "sklearn", "threadpoolctl", "transformers"):
    pytest.importorskip(needed)

import transformers

import loraxs_kernels as lxk
from bench import bench_train, generation, train_memory, train_methods, train_models, train_report
from bench.train_methods import EAGER, EIGENTUNE, LORA, METHODS, OURS, UNPACKED
from bench.train_models import BATCHES, Subject
from loraxs_kernels.demo.data import Snippet

# New names of transformers 5 for what older versions also know.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

RANK, LAYERS = 4, 14  # two blocks of seven linear modules
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Any = model(input_ids=batch["ids"], labels=batch["ids"], use_cache=False)
    return found.loss


def batches(subject: Subject, snippets: Sequence[Snippet]) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(0, 97, (4, 24), generator=g)} for _ in range(BATCHES)]


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    monkeypatch.setattr(train_models.data, "fetch_archive", lambda: None)
    monkeypatch.setattr(train_models.data, "read_snippets", lambda _: [])
    made = Subject(
        "smollm2", "tiny", TARGETS, build, lambda texts: [[1]], lambda m: m, lambda m: None, loss,
        batches,
    )  # fmt: skip
    known = {"smollm2": lambda: made}
    for module in (train_memory, bench_train):
        monkeypatch.setattr(module, "SUBJECTS", known)
    yield made


def all_methods(subject: Subject) -> dict[str, train_methods.Adapted]:
    ours = train_methods.attach(OURS, subject, subject.build(), RANK)
    others = {
        m: train_methods.attach_alike(m, subject, ours.model, RANK) for m in METHODS if m != OURS
    }
    return {OURS: ours, **others}


def test_methods_train_the_same_function(subject: Subject) -> None:
    adapted = all_methods(subject)
    found = subject.text()
    train_methods.check_agreement(adapted, found[0])
    weights = {p.data_ptr() for p in adapted[OURS].model.parameters() if not p.requires_grad}
    for method, one in adapted.items():
        assert {p.data_ptr() for p in one.model.parameters()} >= weights, "a copy of the weights"
        trained = [p for p in one.model.parameters() if p.requires_grad]
        assert len(one.adapter) == len(trained) == LAYERS * (2 if method == LORA else 1)
    kinds = {type(m) for m in adapted[EAGER].model.modules()}
    assert lxk.LoRAXSLinear not in kinds
    assert all(m.prepack is False for m in adapted[UNPACKED].model.modules()
               if isinstance(m, lxk.LoRAXSLinear))  # fmt: skip
    losses = {m: [one.step(found) for _ in range(6)] for m, one in adapted.items()}
    assert losses[OURS] == pytest.approx(losses[EAGER], rel=1e-4)
    with torch.no_grad():
        adapted[EIGENTUNE].adapter[3].mul_(1.5)
    with pytest.raises(RuntimeError, match="EigenTune"):
        train_methods.check_agreement(adapted, found[0])


@pytest.mark.parametrize("method", METHODS)
def test_sizes(subject: Subject, method: str) -> None:
    one = train_methods.attach(method, subject, subject.build(), RANK)
    assert one.seconds > 0
    one.step(subject.text())
    shapes = [m.weight.shape for n, m in build().named_modules() if n.rpartition(".")[2] in TARGETS]
    sides = sum(RANK * (a + b) for a, b in shapes)
    trained = sides if method == LORA else LAYERS * RANK**2
    bases = 0 if method == LORA else sides
    assert one.sizes() == {
        "adapter": 4 * trained, "bases": 4 * bases, "optimizer": 8 * trained,
    }  # fmt: skip


@pytest.mark.parametrize("method", [OURS, EAGER, LORA, EIGENTUNE])
def test_checkpointing_recomputes(subject: Subject, method: str) -> None:
    one = train_methods.attach(method, subject, subject.build(), RANK)
    calls: list[int] = []
    for module in one.model.modules():
        if type(module).__name__ == "LlamaMLP":
            # Before the call: recomputing ends where the last saved tensor is made.
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for on in (True, False):
        train_methods.checkpointing(subject, one.model, on)
        calls.clear()
        one.step(subject.text())
        counts.append(len(calls))
    assert counts == [4, 2]


def test_steps_in_turns_and_what_is_said(subject: Subject) -> None:
    found = bench_train.time_steps(subject, RANK, False, METHODS, 0.05)
    assert found["tokens"] == 96 and set(found["timings_s"]) == set(METHODS)
    results = {
        "train smollm2 kept": json.loads(json.dumps(found, default=bench_train.common.plain))
    }
    printed = train_report.markdown(results)
    rows = [line for line in printed.splitlines() if line.startswith("| ours |")]
    speed = 96 / found["timings_s"][OURS].median
    assert len(rows) == 2 and f"| {speed:.0f} |" in rows[0]
    assert "| eager |" in printed and "1.000" in printed


def test_generation(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    found = generation.measure(subject, RANK, rounds=1)
    assert [n for n, _ in found] == [0, 1, 1, 1, 1, 64]
    assert len(generation.rows(json.loads(json.dumps(
        generation.as_json(found), default=bench_train.common.plain
    )))) == 6  # fmt: skip
    assert found[64, OURS]["next"].samples == generation.NEW_TOKENS - 1
    tokens = torch.arange(8).view(4, 2)
    with pytest.raises(RuntimeError, match="50%"):
        generation._compare((1, EAGER), tokens, torch.where(tokens < 4, tokens, 0))


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")


@linux
def test_the_peak_sees_what_was_freed() -> None:
    train_memory._reset_peak()
    before = train_memory._status("VmRSS")
    size = 96 * 2**20
    torch.ones(size // 4).sum()
    assert train_memory._status("VmHWM") - before > 0.9 * size
    train_memory._reset_peak()
    assert train_memory._status("VmHWM") - before < 0.5 * size


@linux
@pytest.mark.parametrize("method", [OURS, EAGER])
def test_memory(subject: Subject, method: str) -> None:
    found = train_memory.measure("smollm2", method, RANK)
    assert found["trained"] == LAYERS * RANK**2 and found["startup_s"] > 0
    assert set(found["peak"]) == {"kept", "recomputed"}
    assert found["sizes"]["optimizer"] == 2 * found["sizes"]["adapter"] > 0


def test_a_run_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    names = ["memory minilm ours", "memory minilm eager"]

    def jobs(*_: Any) -> dict[str, Any]:
        return {name: functools.partial(run, name) for name in names}

    def run(name: str) -> dict[str, Any]:
        done.append(name)
        return _memory_of(1 + len(done))

    monkeypatch.setattr(bench_train, "jobs", jobs)
    common = ["--out", str(tmp_path)]
    bench_train.main([*common, "--minutes", "0"])
    assert not done and "2 jobs left out" in capsys.readouterr().out
    bench_train.main(common)
    bench_train.main(common)
    assert done == names
    stored = json.loads((tmp_path / "train.json").read_text())
    stored["results"][names[1]]["others"] = "WARNING: others used 38 %"
    (tmp_path / "train.json").write_text(json.dumps(stored))
    bench_train.main([*common, "--minutes", "0"])
    assert "Disturbed: memory minilm eager (WARNING: others" in capsys.readouterr().out
    bench_train.main(common)
    assert done == [*names, names[1]], "what was disturbed is measured again"
    assert "Disturbed" not in capsys.readouterr().out
    done.pop()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{train_report.BEGIN}\nold\n{train_report.END}\nafter\n")
    bench_train.main([*common, "--docs", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| ours | 16 | 1 | 2 | 3.0 | 2.00 | 1 |" in text and "Machine: " in text
    bench_train.main([*common, "--rank", "8"])
    assert done == names * 2, "other settings are other results"
    bench_train.main([*common, "--rank", "8", "--fresh"])
    assert done == names * 3
    with pytest.raises(ValueError, match="bench-train: begin"):
        train_report.replace_between_markers(tmp_path / "train.json", "x")


def _memory_of(seconds: float) -> dict[str, Any]:
    return {
        "startup_s": seconds, "startup_peak": 2**20, "peak": {"kept": 2**21, "recomputed": 2**20},
        "sizes": {"adapter": 1024, "bases": 3 * 2**20, "optimizer": 2048}, "trained": 16, "bare": 0,
    }  # fmt: skip


def test_batches_of_text() -> None:
    words = [f"w{i}" for i in range(40)]
    snippets = [Snippet(i, float(i % 2) - 0.5, " ".join(words[: 20 + i % 21])) for i in range(300)]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [[int(word[1:]) for word in text.split()] for text in texts]

    subject: Any = type("Stub", (), {"encode": staticmethod(encode)})()
    found = train_models._classified(subject, snippets)
    assert [tuple(b["ids"].shape) for b in found] == [(16, 32)] * BATCHES
    assert {int(label) for b in found for label in b["labels"]} == {0, 1}
    assert torch.equal(found[0]["ids"][0], torch.arange(32))
    found = train_models._running_text(subject, snippets)
    assert [tuple(b["ids"].shape) for b in found] == [(4, 128)] * BATCHES
    assert torch.equal(found[0]["ids"][0, :20], torch.arange(20))
