"""Whole models: layers at once, the disk cache, ranks that share the work."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import loraxs_kernels as lxk
from loraxs_kernels.factors import stacked_factors
from loraxs_kernels.initialization import FactorCache, Job, initial_factors, layers
from loraxs_kernels.initialization.cache import cache_key
from loraxs_kernels.initialization.layers import stacks
from loraxs_kernels.initialization.pool import run_at_once, threads_per_layer


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(64 + 8 * i, 72) for i in range(6))
        self.tied = self.blocks[1]


CONFIG = lxk.LoRAXSConfig(rank=4, target_modules=["blocks.*"], seed=5)
OPTIONS = {
    "sigma": "A",
    "sign": "u",
    "r_init": "normal",
    "r_std": 1e-5,
    "subspace": "top",
    "seed": 5,
}


def factors_of(model: nn.Module) -> dict[str, list[Tensor]]:
    return {
        name: [m.A, m.R.detach(), m.B, m.S]
        for name, m in model.named_modules()
        if isinstance(m, lxk.LoRAXSLinear)
    }


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = factors_of(one), factors_of(two)
    assert set(a) == set(b) and len(a) == 6
    return all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that are decomposed from now on."""
    seen: list[tuple[int, ...]] = []
    real = layers.lora_xs_factors

    def counted(weight: Tensor, rank: int, **options: Any) -> lxk.LoRAXSFactors:
        seen.append(tuple(weight.shape))
        return real(weight, rank, **options)

    monkeypatch.setattr(layers, "lora_xs_factors", counted)
    return seen


# ------------------------------------------------------------------ at once


def test_layers_at_once_equal_one_after_the_other(two_threads: None) -> None:
    together = lxk.inject_lora_xs(Stack(), CONFIG)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert same(together, lxk.inject_lora_xs(Stack(), CONFIG))
    model = Stack()
    for name, (A, R, B, S) in factors_of(together).items():
        layer = model.get_submodule(name)
        alone = lxk.lora_xs_factors(layer.weight, 4, seed=5)
        assert all(torch.equal(x, y) for x, y in zip(alone, (A, R, B, S), strict=True))
    assert together.tied is together.blocks[1]  # type: ignore[index]


def test_workers_run_beside_each_other_with_one_thread_each(two_threads: None) -> None:
    meeting = threading.Barrier(2, timeout=30)
    seen = []

    def work(item: int) -> int:
        seen.append((threading.get_ident(), torch.get_num_threads()))
        meeting.wait()  # breaks, and raises, if only one is ever here
        return item * item

    assert dict(run_at_once(work, [1, 2, 3, 4], [10] * 4)) == {1: 1, 2: 4, 3: 9, 4: 16}
    assert {threads for _, threads in seen} == {1} and len({ident for ident, _ in seen}) == 2
    assert torch.get_num_threads() == 2
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2], "threads that start later get the caller's number again"


def test_large_layers_get_more_threads() -> None:
    assert threads_per_layer(1 << 20, 64) == 1
    assert threads_per_layer(1 << 30, 64) == 8
    assert threads_per_layer(1 << 30, 2) == 2
    assert threads_per_layer(1 << 30, 1) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_names_the_layer_and_leaves_the_model_alone(threads: int) -> None:
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = Stack()
        with torch.no_grad():
            model.blocks[3].weight[1, 2] = float("nan")  # type: ignore[operator]
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"^blocks\.3: weight: contains NaN"):
            lxk.inject_lora_xs(model, CONFIG)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before_threads)
    assert all(type(m) is nn.Linear for m in model.blocks)
    assert all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(v.nan_to_num(), after[k].nan_to_num()) for k, v in before.items())


def test_a_rank_too_large_is_refused_before_anything_is_computed(
    computed: list[tuple[int, ...]],
) -> None:
    config = lxk.LoRAXSConfig(rank=4, target_modules=["blocks.*"], rank_pattern={"blocks.5": 73})
    with pytest.raises(ValueError, match=r"^blocks\.5: rank: got 73"):
        lxk.inject_lora_xs(Stack(), config)
    assert computed == []


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    lxk.inject_lora_xs(Stack(), CONFIG, progress=True)
    assert "LoRA-XS init: 100%" in (err := capsys.readouterr().err) and "6/6" in err
    lxk.inject_lora_xs(Stack(), CONFIG)
    assert capsys.readouterr().err == ""


def test_stacks_of_equal_layers() -> None:
    # What runs on a GPU.
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(90, 70, generator=generator) for _ in range(3)]
    weights.append(torch.randn(70, 90, generator=generator))
    jobs = [Job(str(i), w, 4) for i, w in enumerate(weights)]
    assert [[job.name for job in stack] for stack in stacks(jobs)] == [["0", "1", "2"], ["3"]]
    together = stacked_factors(weights[:3], 4, names=["a", "b", "c"], sigma="both", seed=2)
    for w, got in zip(weights, together, strict=False):
        alone = lxk.lora_xs_factors(w, 4, sigma="both", seed=2)
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))
        assert got.S.untyped_storage().nbytes() == 4 * 4
    weights[1][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^b: weight"):
        stacked_factors(weights[:3], 4, names=["a", "b", "c"])


# ------------------------------------------------------------------ the cache


def test_second_injection_reads_the_cache(tmp_path: Path, computed: list[tuple[int, ...]]) -> None:
    first = lxk.inject_lora_xs(Stack(), CONFIG, cache_dir=tmp_path / "made")
    assert len(computed) == 6
    second = lxk.inject_lora_xs(Stack(), CONFIG, cache_dir=tmp_path / "made")
    assert len(computed) == 6
    assert same(first, second)
    assert len(list((tmp_path / "made").iterdir())) == 6, "six files, no leftovers"


def test_environment_names_the_cache(
    tmp_path: Path, computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAXS_CACHE", str(tmp_path))
    lxk.inject_lora_xs(Stack(), CONFIG)
    lxk.save_adapter(model := lxk.inject_lora_xs(Stack(), CONFIG), tmp_path / "adapter")
    assert same(model, lxk.load_adapter(Stack(), tmp_path / "adapter"))
    assert len(computed) == 6
    monkeypatch.setenv("LORAXS_CACHE", "")
    lxk.inject_lora_xs(Stack(), CONFIG)
    assert len(computed) == 12


def test_a_run_that_was_cut_short_goes_on(
    tmp_path: Path, computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = layers.lora_xs_factors

    def stops(weight: Tensor, rank: int, **options: Any) -> lxk.LoRAXSFactors:
        if len(computed) == 4:
            raise KeyboardInterrupt
        return counted(weight, rank, **options)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        monkeypatch.setattr(layers, "lora_xs_factors", stops)
        with pytest.raises(KeyboardInterrupt):
            lxk.inject_lora_xs(Stack(), CONFIG, cache_dir=tmp_path)
        monkeypatch.setattr(layers, "lora_xs_factors", counted)
        lxk.inject_lora_xs(Stack(), CONFIG, cache_dir=tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert sorted(computed) == sorted((72, 64 + 8 * i) for i in range(6)), "each layer once"


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "other", "header"])
def test_damaged_files_are_replaced(
    tmp_path: Path, computed: list[tuple[int, ...]], damage: str
) -> None:
    first = lxk.inject_lora_xs(Stack(), CONFIG, cache_dir=tmp_path)
    files = sorted(tmp_path.iterdir())
    data = files[0].read_bytes()
    files[0].write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "flipped": data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
            "other": files[1].read_bytes(),
            "header": b"\xff" * 8 + data[8:],
        }[damage]
    )
    with pytest.warns(UserWarning, match="cache: .* is damaged and will be replaced"):
        second = lxk.inject_lora_xs(Stack(), CONFIG, cache_dir=tmp_path)
    assert same(first, second) and len(computed) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lxk.inject_lora_xs(Stack(), CONFIG, cache_dir=tmp_path)
    assert len(computed) == 7 and files[0].read_bytes() == data


def test_what_the_key_depends_on() -> None:
    W = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    changed = W.clone()
    changed[3, 3] += 1e-6
    variants = [
        cache_key(W, 4, OPTIONS),
        cache_key(changed, 4, OPTIONS),
        cache_key(W.T.contiguous(), 4, OPTIONS),
        cache_key(W.reshape(6, 8), 4, OPTIONS),
        cache_key(W.bfloat16(), 4, OPTIONS),
        cache_key(W.view(torch.float16).float(), 4, OPTIONS),
        cache_key(W, 3, OPTIONS),
        *(
            cache_key(W, 4, {**OPTIONS, **change})
            for change in (
                {"sigma": "B"}, {"sign": "v"}, {"sign": None}, {"seed": 6}, {"r_std": 1e-4},
                {"r_init": "zeros"}, {"subspace": "bottom"},
            )
        ),
    ]  # fmt: skip
    assert len(set(variants)) == len(variants)
    assert cache_key(W.T.contiguous().T, 4, dict(reversed(OPTIONS.items()))) == variants[0]


def test_a_full_disk_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.warns(UserWarning, match="nothing was kept"):
        model = lxk.inject_lora_xs(Stack(), CONFIG, cache_dir=tmp_path)
    assert len(factors_of(model)) == 6
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        lxk.inject_lora_xs(Stack(), CONFIG, cache_dir=tmp_path / "file" / "cache")


def write_again_and_again(directory: str, worker: int) -> int:
    """Store and load one entry many times; returns how many loads were whole."""
    warnings.simplefilter("error")  # a damaged file would be reported
    cache = FactorCache(directory)
    good = lxk.lora_xs_factors(torch.eye(64), 8, r_init="zeros")
    whole = 0
    for _ in range(60):
        cache.store("k", good)
        found = cache.load("k")
        whole += found is not None and torch.equal(found.A, good.A)
    return whole


def test_concurrent_writers(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=mp.get_context("spawn")) as pool:
        done = pool.map(write_again_and_again, [str(tmp_path)] * 2, range(2))
        assert list(done) == [60, 60]
    assert [f.name for f in tmp_path.iterdir()] == ["k.safetensors"]


def test_equal_weights_share_a_file_but_no_memory(
    tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    W = torch.randn(30, 20)
    jobs = [Job("one", W, 3), Job("two", W.clone(), 3)]
    found = initial_factors(jobs, OPTIONS, cache=FactorCache(tmp_path))
    assert len(computed) == 1
    assert torch.equal(found["one"].A, found["two"].A)
    assert found["one"].A.data_ptr() != found["two"].A.data_ptr()


# ------------------------------------------------------------------ ranks


SCENARIOS = ("equal", "shards", "failure", "one rank alone")


def ranked(rank: int, directory: str) -> None:
    """One of two processes: plays every scenario, and writes what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2
    )
    torch.save({s: play(rank, s) for s in SCENARIOS}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def play(rank: int, scenario: str) -> tuple[list[tuple[int, ...]], Any, str]:
    """The shapes of what this rank computed, the factors it got, the error it saw."""
    counted: list[tuple[int, ...]] = []
    real = layers.lora_xs_factors

    def counting(weight: Tensor, r: int, **options: Any) -> lxk.LoRAXSFactors:
        if scenario == "failure" and rank == 1:
            raise ValueError("out of luck")
        counted.append(tuple(weight.shape))
        return real(weight, r, **options)

    model = Stack()
    if scenario == "shards":  # two layers differ from rank to rank, as under tensor parallelism
        with torch.no_grad():
            for i in (0, 4):
                model.blocks[i].weight.mul_(1.0 + rank)  # type: ignore[operator]
    layers.lora_xs_factors = counting  # type: ignore[assignment]
    try:
        if scenario != "one rank alone":
            return counted, factors_of(lxk.inject_lora_xs(model, CONFIG)), ""
        if rank == 0:
            return counted, factors_of(lxk.inject_lora_xs(model, CONFIG, share=False)), ""
        return counted, None, ""
    except (RuntimeError, ValueError) as error:
        return counted, None, f"{type(error).__name__}: {error}"
    finally:
        layers.lora_xs_factors = real


Outcomes = list[dict[str, tuple[list[tuple[int, ...]], Any, str]]]


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(ranked, args=(str(directory),), nprocs=2)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_ranks_divide_the_layers(both_ranks: Outcomes) -> None:
    (count0, result0, _), (count1, result1, _) = (ranks["equal"] for ranks in both_ranks)
    assert len(count0) == len(count1) == 3
    assert len({*count0, *count1}) == 6
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = factors_of(lxk.inject_lora_xs(Stack(), CONFIG))
    torch.set_num_threads(threads)
    for result in (result0, result1):
        assert set(result) == set(alone)
        for name, expected in alone.items():
            assert all(torch.equal(a, b) for a, b in zip(result[name], expected, strict=True))


def test_ranks_with_different_shards_compute_their_own(both_ranks: Outcomes) -> None:
    (count0, result0, _), (count1, result1, _) = (ranks["shards"] for ranks in both_ranks)
    assert len(count0) == len(count1) == 4, "two of their own and half of the four in common"
    for i in (0, 4):
        torch.testing.assert_close(2 * result0[f"blocks.{i}"][3], result1[f"blocks.{i}"][3])
    for i in (1, 2, 3, 5):
        assert torch.equal(result0[f"blocks.{i}"][0], result1[f"blocks.{i}"][0])


def test_a_failure_on_one_rank_is_raised_on_all(both_ranks: Outcomes) -> None:
    (_, _, message0), (_, _, message1) = (ranks["failure"] for ranks in both_ranks)
    assert "RuntimeError: rank 1 could not initialize its layers" in message0
    assert "out of luck" in message0 and "out of luck" in message1


def test_one_rank_may_call_alone(both_ranks: Outcomes) -> None:
    (count0, result0, message0), (count1, _, message1) = (
        ranks["one rank alone"] for ranks in both_ranks
    )
    assert message0 == message1 == "" and len(count0) == 6 and count1 == []
    assert len(result0) == 6
