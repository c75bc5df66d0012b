"""The host side of the CUDA extension: table, geometry, checks, plans. No GPU, no kernel is run."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from loraxs_kernels import dispatch
from loraxs_kernels.backends import cuda, gpu
from loraxs_kernels.backends.cuda import plan as planning
from loraxs_kernels.backends.cuda.plan import Kernel, Plan
from loraxs_kernels.backends.triton.plan import Gpu, Problem
from tests.cuda_device import require_library
from tests.cuda_problem import PROBLEM, Facts, geometry, partial_sums, split_scaling

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
A100 = Gpu(80, 108, 163 * 1024)
H100 = Gpu(90, 132, 227 * 1024)
B200 = Gpu(100, 148, 227 * 1024)


@pytest.fixture(scope="module")
def table() -> tuple[Kernel, ...]:
    require_library()
    return planning.kernels()[1]


@pytest.fixture
def ops() -> Any:
    require_library()
    return torch.ops.loraxs_cuda


def _facts(k: Kernel) -> Facts:
    names = {f.name for f in dataclasses.fields(Facts)}
    return Facts(**{n: v for n, v in dataclasses.asdict(k).items() if n in names})


# --------------------------------------------------------------------------------- what is there


def test_problem_lies_as_python_says(ops: Any) -> None:
    layout = json.loads(ops.problem_layout())
    assert layout.pop("size") == PROBLEM.itemsize
    assert PROBLEM.fields is not None
    assert layout == {n: [at, d.itemsize] for n, (d, at, *_) in PROBLEM.fields.items()}


def test_the_table_of_kernels(table: tuple[Kernel, ...]) -> None:
    assert len({k.name for k in table}) == len(table)
    for family in ("ride-along", "ticket", "few-rows"):
        for element in ("bfloat16", "float16"):
            for direction in ("forward", "backward"):
                same = [k for k in table if (k.family, k.element, k.direction)
                        == (family, element, direction)]  # fmt: skip
                assert same, (family, element, direction)
    for k in table:
        assert k.bm > 0 and k.bn > 0 and k.bk > 0 and k.br > 0 and k.cr % 16 == 0, k.name
        assert k.threads % 32 == 0 and 32 <= k.threads <= 1024, k.name
        assert k.shared <= (227 if k.exact_arch else 163) * 1024, k.name


# --------------------------------------------------------------------------------- geometry


SIZES = [(1, 1, 1, 1), (17, 72, 88, 12), (64, 1504, 736, 64), (128, 128, 4096, 256)]


@pytest.mark.parametrize("size", [*SIZES, (2049, 5000, 777, 136)])
def test_geometry(ops: Any, table: tuple[Kernel, ...], size: tuple[int, int, int, int]) -> None:
    m, n, depth, rank = size
    seen = 0
    for k in table:
        if rank > k.max_rank or (k.max_rows and m > k.max_rows):
            continue
        rides = k.family in ("ride-along", "cluster")
        for has_d, need_dr, per_row in ((True, False, False), (True, True, False),
                                        (False, True, True), (True, True, True)):  # fmt: skip
            if rides and (per_row or not has_d):
                continue
            adapters = 5 if per_row else 1
            chunks = min(2, m) if need_dr else 1
            most = -(-depth // k.bk)
            parts = min(3, most) if k.family == "few-rows" and has_d else 1
            got = json.loads(ops.geometry(
                k.index, m, n, depth, rank, adapters, has_d, True, not need_dr, need_dr, need_dr,
                per_row, chunks, parts, 4,
            ))  # fmt: skip
            want = geometry(
                _facts(k), m, n, depth, rank, has_d=has_d, need_dr=need_dr, need_db=need_dr,
                adapters=adapters, per_row=per_row, chunks=chunks, parts=parts, group=4,
            )  # fmt: skip
            common = want.keys() & got.keys()
            assert len(common) >= 9
            assert {n: got[n] for n in common} == {n: want[n] for n in common}, k.name
            assert got["partial"] == partial_sums(_facts(k), want), k.name
            seen += 1
    assert seen


def _geometry(ops: Any, k: Kernel, m: int, n: int, depth: int, rank: int, **more: Any) -> Any:
    given = {
        "adapters": 1, "has_d": True, "has_w": True, "has_side": True, "need_dR": False,
        "need_db": False, "per_row": False, "chunks": 1, "parts": 1, "group": 8,
    } | more  # fmt: skip
    return json.loads(ops.geometry(k.index, m, n, depth, rank, *given.values()))


def _find(table: tuple[Kernel, ...], family: str, direction: str = "forward") -> Kernel:
    """The bfloat16 kernel of a family; the aligned one, the first if there are several."""
    return next(
        k for k in table
        if k.family == family and k.direction == direction and k.element == "bfloat16"
        and (k.aligned or family == "few-rows")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "sizes", "more", "said"),
    [
        ("ticket", (0, 8, 8, 8), {}, r"x: expected at least one row and one column, got \[0, 8\]"),
        ("ticket", (8, 0, 8, 8), {}, "b: expected at least one row"),
        ("ticket", (8, 8, 8, 257), {}, "a: expected 1 to 256 rows .* got 257"),
        ("ride-along", (8, 8, 8, 17), {}, "a: expected 1 to 16 rows"),
        ("few-rows", (65, 8, 8, 8), {}, "x: expected at most (16|64) rows"),
        ("ticket", (2**31, 8, 8, 8), {}, "x: rows: expected at most 2147483647"),
        ("ticket", (2**30, 2**30, 8, 8), {}, "d: tiles: expected at most 2147483647"),
        ("ticket", (8, 8, 8, 8), {"chunks": 9}, "chunks: expected 1 to 8, got 9"),
        ("ticket", (8, 8, 8, 8), {"group": 0}, "group: expected at least 1"),
        ("ticket", (8, 8, 512, 8), {"parts": 2}, "parts: expected 1 to 1"),
        ("few-rows", (8, 8, 512, 8), {"parts": 99}, "parts: expected 1 to"),
        ("ride-along", (8, 8, 8, 8), {"has_d": False}, "d: kernel .* computes Q beside D only"),
    ],
)
def test_sizes_that_are_refused(
    ops: Any, table: tuple[Kernel, ...], family: str, sizes: Any, more: Any, said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        _geometry(ops, _find(table, family), *sizes, **more)


# --------------------------------------------------------------------------------- checks


ARGUMENTS = (
    "x", "w", "base", "a", "core", "b", "bias", "q", "ids", "order", "offsets", "d", "side", "dR",
    "db", "flags", "bad_id", "scaling", "kernel", "chunks", "parts", "group",
)  # fmt: skip


def _pass(k: Kernel, **changes: Any) -> list[Any]:
    """The arguments of one pass with 24 rows, K = 40, N = 32, rank 16, in the kernel's layouts."""
    m, n, depth, rank = 24, 32, 40, 16
    backward = k.direction == "backward"

    def matrix(rows: int, cols: int, *, swapped: bool = False) -> Tensor:
        return torch.zeros(cols, rows, dtype=BF16).mT if swapped else torch.zeros(
            rows, cols, dtype=BF16
        )  # fmt: skip

    given: dict[str, Any] = dict.fromkeys(ARGUMENTS)
    given |= {
        "x": matrix(m, depth), "w": matrix(n, depth, swapped=backward),
        "a": matrix(rank, depth, swapped=backward), "core": torch.zeros(rank, rank),
        "b": matrix(n, rank, swapped=backward), "d": matrix(m, n),
        "flags": torch.zeros(4096, dtype=torch.int32), "scaling": 0.7, "kernel": k.index,
        "chunks": 1, "parts": 1, "group": 8,
    }  # fmt: skip
    if backward:
        given |= {
            "q": matrix(m, rank), "dR": torch.zeros(rank, rank),
            "db": torch.zeros(depth, dtype=BF16),
        }  # fmt: skip
    else:
        given["side"] = matrix(m, rank)
    return list((given | changes).values())


IDS = torch.zeros(24, dtype=torch.int64)
BAD = torch.zeros(1, dtype=torch.int32)
ROWS = {"core": torch.zeros(3, 16, 16), "ids": IDS, "bad_id": BAD}


def test_what_is_prepared(ops: Any, table: tuple[Kernel, ...]) -> None:
    """Every pointer is a tensor's address, every stride and count what the operands say."""
    for direction in ("forward", "backward"):
        k = _find(table, "ticket", direction)
        arguments = _pass(k, scaling=3.0)
        told, raw, side, t, partial = ops.prepare(*arguments)
        launched = json.loads(told)
        assert (launched["kernel"], launched["threads"]) == (k.name, k.threads)
        p = raw.numpy().view(PROBLEM)[0]
        given = dict(zip(ARGUMENTS, arguments, strict=True))
        given |= {"dr": given.pop("dR"), "t": t, "partial": partial}
        given["side"] = side if given["side"] is None else given["side"]
        for name in ("x", "w", "base", "a", "core", "b", "bias", "q", "ids", "order", "offsets",
                     "d", "side", "t", "dr", "db", "partial", "flags", "bad_id"):  # fmt: skip
            assert p[name] == (0 if given[name] is None else given[name].data_ptr()), name
        assert (p["m"], p["n"], p["k"], p["rank"], p["adapters"]) == (24, 32, 40, 16, 1)
        assert (p["x_row"], p["d_row"], p["core_row"], p["core_col"]) == (40, 32, 16, 1)
        assert p["w_row"] == (32 if direction == "backward" else 40)
        assert p["core_is_fp32"] == 1 and p["dr_scale"] == 3.0
        assert tuple(p[["fraction", "before", "after"]]) == split_scaling(3.0)


VIEWS: dict[str, Any] = {
    "x: expected bfloat16": {"x": torch.zeros(24, 40)},
    "x: expected 2 dimensions": {"x": torch.zeros(24, dtype=BF16)},
    "x: expected contiguous rows": {"x": torch.zeros(40, 24, dtype=BF16).mT},
    "x: expected rows that do not overlap": {"x": torch.zeros(1, 40, dtype=BF16).expand(24, 40)},
    "x: expected data at a multiple of 16": {"x": torch.zeros(24, 41, dtype=BF16)[:, 1:]},
    r"w: expected shape \[32, 40\], got \[32, 41\]": {"w": torch.zeros(32, 41, dtype=BF16)},
    "w: expected contiguous rows": {"w": torch.zeros(40, 32, dtype=BF16).mT},
    "w: expected None, because d is None": {"d": None, "side": torch.zeros(24, 16, dtype=BF16)},
    "base: expected bfloat16": {"base": torch.zeros(24, 32)},
    r"a: expected shape \[16, 40\]": {"a": torch.zeros(16, 41, dtype=BF16)},
    r"b: expected shape \[32, 16\]": {"b": torch.zeros(32, 17, dtype=BF16)},
    "core: expected bfloat16": {"core": torch.zeros(16, 16, dtype=FP16)},
    r"core: expected shape \[16, 16\]": {"core": torch.zeros(16, 17)},
    "bias: expected bfloat16": {"bias": torch.zeros(32)},
    r"bias: expected shape \[32\]": {"bias": torch.zeros(31, dtype=BF16)},
    "bias: expected a contiguous vector": {"bias": torch.zeros(64, dtype=BF16)[::2]},
    r"d: expected shape \[24, 32\]": {"d": torch.zeros(24, 33, dtype=BF16)},
    "side: expected bfloat16": {"side": torch.zeros(24, 16)},
    "dR: expected None for kernel": {"dR": torch.zeros(16, 16)},
    "db: expected None for kernel": {"db": torch.zeros(40, dtype=BF16)},
    "q: expected None, because dR is None": {"q": torch.zeros(24, 16, dtype=BF16)},
    "flags: expected at least": {"flags": torch.zeros(3, dtype=torch.int32)},
    "flags: expected at least .* contiguous int32": {"flags": torch.zeros(4096)},
    "flags: expected .* got None": {"flags": None},
    "ids: expected a tensor if core has three": {"core": torch.zeros(3, 16, 16)},
    "ids: expected int64": {**ROWS, "ids": IDS.int()},
    r"ids: expected shape \[24\]": {**ROWS, "ids": IDS[:-1]},
    "bad_id: expected a tensor, because ids": {**ROWS, "bad_id": None},
    "bad_id: expected one int32": {**ROWS, "bad_id": torch.zeros(2, dtype=torch.int32)},
    "bad_id: expected None": {"bad_id": BAD},
    "order, offsets: expected both or none": {**ROWS, "order": IDS},
    "order: expected int64": {**ROWS, "order": IDS.int(), "offsets": torch.zeros(5).long()},
    r"offsets: expected shape \[5\]": {**ROWS, "order": IDS, "offsets": torch.zeros(4).long()},
    "kernel: expected 0 to": {"kernel": 10_000},
    "x: expected a dense strided tensor": {"x": torch.zeros(24, 40, dtype=BF16).to_sparse()},
    "w: expected a tensor on cpu": {"w": torch.zeros(32, 40, dtype=BF16, device="meta")},
}


@pytest.mark.parametrize("said", VIEWS)
def test_a_bad_argument_names_itself(ops: Any, table: tuple[Kernel, ...], said: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{said}"):
        ops.prepare(*_pass(_find(table, "ticket"), **VIEWS[said]))


BACKWARD: dict[str, Any] = {
    "w: expected contiguous columns": {"w": torch.zeros(32, 40, dtype=BF16)},
    "q: expected a tensor, because dR is given": {"q": None},
    "dR: expected a contiguous tensor like core": {"dR": torch.zeros(16, 16, dtype=BF16)},
    r"db: expected shape \[40\]": {"db": torch.zeros(41, dtype=BF16)},
}


@pytest.mark.parametrize("said", BACKWARD)
def test_a_bad_argument_of_a_backward(ops: Any, table: tuple[Kernel, ...], said: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{said}"):
        ops.prepare(*_pass(_find(table, "ticket", "backward"), **BACKWARD[said]))


@pytest.mark.parametrize("family", ["ride-along", "cluster"])
def test_one_core_for_all_rows(ops: Any, table: tuple[Kernel, ...], family: str) -> None:
    if not any(k.family == family for k in table):
        pytest.skip(f"the library is built without kernels of family {family}")
    with pytest.raises(RuntimeError, match=r"^ids: kernel .* takes one core for all rows"):
        ops.prepare(*_pass(_find(table, family), **ROWS))


def test_run_wants_a_gpu(ops: Any, table: tuple[Kernel, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"^x: expected a CUDA tensor"):
        ops.run(*_pass(_find(table, "ticket")))


# --------------------------------------------------------------------------------- plans


def _kernel(name: str, family: str, index: int, **changes: Any) -> Kernel:
    given: dict[str, Any] = {
        "element": "bfloat16", "direction": "forward", "min_arch": 80, "exact_arch": 0,
        "aligned": 1, "max_rows": 0, "max_rank": 256, "threads": 256, "cluster": 1,
        "shared": 64 * 1024, "bm": 128, "bn": 128, "bk": 32, "br": 64, "cr": 32, "di": 64, "dj": 64,
        "dm": 64, "db_columns": 64, "maps": 0,
    }  # fmt: skip
    return Kernel(index=index, name=name, family=family, **(given | changes))


TABLE = (
    _kernel("ride", "ride-along", 0, max_rank=16, br=16),
    _kernel("ticket", "ticket", 1),
    _kernel("unaligned", "ticket", 2, aligned=0),
    _kernel("few16", "few-rows", 3, aligned=0, max_rows=16, bm=16, bn=64, bk=128),
    _kernel("few64", "few-rows", 4, aligned=0, max_rows=64, bm=64, bn=128, bk=64),
    _kernel("cluster", "cluster", 5, min_arch=90, exact_arch=1, cluster=4, bn=256, br=16,
            shared=220 * 1024),
)  # fmt: skip
LIBRARY = (("8.0", "9.0a"), TABLE)


def _first(p: Problem, on: Gpu, *, vectors: bool = True) -> str:
    return planning.candidates(p, "bfloat16", "forward", on, LIBRARY, vectors=vectors)[0].kernel


def test_which_kernel() -> None:
    layer = Problem(8192, 4096, 4096, 64, 2)
    assert _first(layer, A100) == "ticket"
    assert _first(layer, H100) == "cluster"
    assert _first(layer, H100, vectors=False) == "ticket"
    assert _first(dataclasses.replace(layer, vectors=False), A100) == "unaligned"
    assert _first(dataclasses.replace(layer, per_row=True, adapters=8), H100) == "ticket"
    assert _first(dataclasses.replace(layer, has_d=False, need_dR=True), H100) == "ticket"
    assert _first(dataclasses.replace(layer, M=1), A100) == "few16"
    assert _first(dataclasses.replace(layer, M=17), H100) == "few64"
    assert _first(dataclasses.replace(layer, M=65), A100) == "ticket"


def test_what_no_kernel_takes() -> None:
    layer = Problem(8192, 4096, 4096, 64, 2)
    for p in (dataclasses.replace(layer, rank=257), dataclasses.replace(layer, mask_input=True)):
        assert not planning.candidates(p, "bfloat16", "forward", A100, LIBRARY, vectors=True)
    assert not planning.candidates(layer, "float32", "forward", A100, LIBRARY, vectors=True)


@pytest.mark.parametrize(
    ("archs", "arch", "generic", "exact"),
    [
        (("8.0",), 80, True, False),
        (("8.0",), 89, True, False),
        (("8.0",), 90, True, False),
        (("8.0", "9.0a"), 90, True, True),
        (("8.0", "9.0a"), 100, True, False),
        (("9.0a",), 90, True, True),
        (("9.0a",), 100, True, False),
        (("8.9",), 80, True, False),
        (("8.0",), 75, False, False),
    ],
)
def test_where_a_kernel_runs(archs: tuple[str, ...], arch: int, generic: bool, exact: bool) -> None:
    assert planning.runs_on(TABLE[1], archs, arch) == generic
    assert planning.runs_on(TABLE[5], archs, arch) == exact


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        ((7, 5), "Some GPU has compute capability 7.5, the kernels need 8.0 or newer"),
        ((8, 6), None),
    ],
)
def test_the_gpu_at_hand(
    table: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], said: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert cuda.unavailable.__wrapped__() == said


def test_few_rows_fill_the_gpu() -> None:
    """About two CTAs per SM, and parts that are worth starting."""
    for n, depth in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (512, 512)):
        p = Problem(1, n, depth, 64, 2)
        plan = planning.candidates(p, "bfloat16", "forward", H100, LIBRARY, vectors=True)[0]
        tiles, steps = -(-n // 64), -(-depth // 128)
        assert 1 <= plan.parts <= max(1, steps // 4)
        assert tiles * plan.parts <= 2 * 132 or plan.parts == 1
    for rows in (1, 64):  # of 64 tiles, two CTAs per SM; of 32, one
        p = Problem(rows, 4096, 4096, 64, 2)
        plan = planning.candidates(p, "bfloat16", "forward", H100, LIBRARY, vectors=True)[0]
        assert plan.parts == 4


def test_chunks_of_dR_fill_the_gpu() -> None:
    p = Problem(8192, 4096, 4096, 64, 2, need_dR=True)
    found = planning.candidates(p, "bfloat16", "forward", A100, LIBRARY, vectors=True)[0]
    assert found.chunks == 8192 // (4 * 64)
    many = dataclasses.replace(p, per_row=True, adapters=1000)
    assert (
        planning.candidates(many, "bfloat16", "forward", A100, LIBRARY, vectors=True)[0].chunks == 1
    )


def test_which_backend_by_arithmetic() -> None:
    def best(p: Problem, on: Gpu) -> Any:
        return gpu.cheapest(p, "bfloat16", "forward", on, LIBRARY, vectors=True)

    layer = Problem(8192, 4096, 4096, 64, 2)
    for rows, on in ((1, A100), (1, H100), (16, H100), (64, H100), (1, B200)):
        assert isinstance(best(dataclasses.replace(layer, M=rows), on), Plan), (rows, on)
    assert isinstance(best(layer, H100), Plan)
    # tcgen05 is Triton's.
    assert not isinstance(best(layer, B200), Plan)
    # What the CUDA kernels do not take.
    assert not isinstance(best(dataclasses.replace(layer, mask_input=True), A100), Plan)
    assert not isinstance(best(dataclasses.replace(layer, rank=512), A100), Plan)


# --------------------------------------------------------------------------------- dispatch


CALL = dispatch.Call("cuda", BF16, FP32, True, False, False, rank=64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "cpu"}, "x is on cpu"),
        ({"dtype": FP32}, "x has dtype torch.float32"),
        ({"core_dtype": torch.float64}, "R has dtype torch.float64"),
        ({"dropout": True}, "no dropout"),
        ({"rank": 257}, "the rank is 257"),
        ({"row_major": False}, "contiguous rows"),
    ],
)
def test_calls_that_are_not_supported(changes: dict[str, Any], said: str) -> None:
    assert cuda.unsupported(CALL) is None
    why = cuda.unsupported(dataclasses.replace(CALL, **changes))
    assert why is not None and said in why


def test_a_call_that_names_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraxs_kernels.backends import triton

    monkeypatch.delenv("LORAXS_BACKEND", raising=False)
    dispatch.default_name.cache_clear()
    for module in (cuda, triton):
        monkeypatch.setattr(module, "unavailable", lambda: None)
    assert dispatch.choose(CALL, None).module is gpu
    for name, module in (("cuda", cuda), ("triton", triton)):
        assert dispatch.choose(CALL, name).module is module
    dropout = dataclasses.replace(CALL, dropout=True)
    assert dispatch.choose(dropout, None).name == "triton"
    monkeypatch.setattr(triton, "unavailable", lambda: "not installed")
    assert dispatch.choose(CALL, None).name == "cuda"
    with pytest.raises(RuntimeError, match=r"'cuda' was asked for but .* no dropout"):
        dispatch.choose(dropout, "cuda")
