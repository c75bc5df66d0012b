"""The compiled CPU ops (csrc/cpu) against plain PyTorch in float64.

``LORAXS_CPU_LIBRARY`` names another build of the library; ``LORAXS_CPU_ISA`` (avx512, avx2 or
generic) makes it use an older instruction set than the machine's best, to test that one too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cpu_layer import (
    KINDS,
    PREPARE,
    SCALING,
    assert_accurate,
    call_backward,
    call_forward,
    check_layer,
    dense,
    error_of,
    make_layer,
    pack,
    transposed,
)

PACKAGE = Path(__file__).resolve().parents[1] / "loraxs_kernels"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [1, 4, 12, 20, 25, 64, 136, 256]
# (rows, in, out): odd sizes, just past the blocks of rows (24, 96, 256) and of depth (1024).
SHAPES = [(1, 17, 3), (3, 736, 65), (17, 33, 1504), (27, 1030, 40), (97, 65, 70), (300, 20, 33)]


@pytest.fixture(scope="module")
def native() -> Any:
    """The ``loraxs_cpu`` ops of the library that is built, or named by ``LORAXS_CPU_LIBRARY``."""
    named = os.environ.get("LORAXS_CPU_LIBRARY")
    libraries = [Path(named)] if named else sorted(PACKAGE.glob("_cpu*.so"))
    if not libraries:
        pytest.skip(f"the C++ library is not built: no _cpu*.so in {PACKAGE.name}/")
    assert libraries[0].is_file(), f"LORAXS_CPU_LIBRARY={named} is not a file"
    torch.ops.load_library(str(libraries[0]))
    return torch.ops.loraxs_cpu


@pytest.mark.parametrize("kind", [*KINDS, "base"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(native: Any, dtype: torch.dtype, rank: int, kind: str) -> None:
    for seed, shape in enumerate(SHAPES):
        core_dtype = dtype if seed % 2 else torch.float32
        layer = make_layer(shape, rank, dtype, core_dtype=core_dtype, seed=seed)
        check_layer(native, layer, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_blocks(native: Any, dtype: torch.dtype) -> None:
    """So many rows that the base product is computed block by block, the last one shorter."""
    check_layer(native, make_layer((1100, 9, 4100), 12, dtype))


@pytest.mark.parametrize("kind", ["panels", "dense", "transposed"])
@pytest.mark.parametrize(
    "shape", [(193, 641, 33), (200, 1300, 700), (25, 2049, 650), (391, 9, 17), (775, 5, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_the_own_product(
    native: Any, dtype: torch.dtype, shape: tuple[int, int, int], kind: str
) -> None:
    """Just past its blocks of rows (192, 768) and of depth (640), in y and, by N, in dx.

    A dense weight of more than 24 rows is packed on the way, by rows or by columns.
    """
    for rank in (4, 25):
        check_layer(native, make_layer(shape, rank, dtype), kind=kind)


@pytest.mark.parametrize("kind", ["dense", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_weight_under_16_bit_rows(native: Any, dtype: torch.dtype, kind: str) -> None:
    layer = make_layer((40, 70, 50), 12, dtype)
    y, q = call_forward(native, layer, PREPARE[kind](layer.weight))
    want = y, q, *call_backward(native, layer, q, PREPARE[kind](layer.weight.T))
    wide = layer.weight.float()
    y, q = call_forward(native, layer, PREPARE[kind](wide))
    got = y, q, *call_backward(native, layer, q, PREPARE[kind](wide.T))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["dense", "panels"])  # dense: streamed, and packed on the way
@pytest.mark.parametrize("shape", [(7, 700, 300), (150, 64, 48), (400, 100, 17)])
def test_products_do_not_depend_on_threads(
    native: Any, shape: tuple[int, int, int], kind: str
) -> None:
    """However rows and columns are shared out, every element is summed in the same order."""
    layer = make_layer(shape, 12, torch.float32)
    weight, weight_t = PREPARE[kind](layer.weight), PREPARE[kind](layer.weight.T)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            y, q = call_forward(native, layer, weight)
            results.append((y, q, *call_backward(native, layer, q, weight_t)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for value, first in zip(result, results[0], strict=True):
            assert torch.equal(value, first)


@pytest.mark.parametrize("kind", ["packed", "panels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(native: Any, dtype: torch.dtype, kind: str) -> None:
    layer = make_layer((37, 50, 41), 12, dtype)
    weight, weight_t = PREPARE[kind](layer.weight), PREPARE[kind](layer.weight.T)
    y, q = call_forward(native, layer, weight)
    grads = call_backward(native, layer, q, weight_t)

    def padded_rows(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(t, (3, 4), value=torch.nan)[:, 3 : 3 + t.shape[1]]

    def column_major(t: torch.Tensor) -> torch.Tensor:
        return t.T.contiguous().T

    relayouts: list[Callable[[torch.Tensor], torch.Tensor]] = [padded_rows, column_major]
    for relayout in relayouts:
        x, grad_y = relayout(layer.x), relayout(layer.grad_y)
        assert not x.is_contiguous()
        got = call_forward(native, layer, weight, x=x)
        got_grads = call_backward(native, layer, q, weight_t, grad_y=grad_y)
        for value, want in zip((*got, *got_grads), (y, q, *grads), strict=True):
            assert torch.equal(value, want)
    # An expanded gradient, as y.sum().backward() makes it.
    ones = torch.ones(1, 1, dtype=dtype).expand_as(layer.grad_y)
    got_grads = call_backward(native, layer, q, weight_t, grad_y=ones)
    want_grads = call_backward(native, layer, q, weight_t, grad_y=ones.contiguous())
    for value, want in zip(got_grads, want_grads, strict=True):
        assert torch.equal(value, want)


@pytest.mark.parametrize("rank", [12, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packings_in_the_rows_dtype(native: Any, dtype: torch.dtype, rank: int) -> None:
    """Base, shrink and expand all packed in x's own dtype."""
    supported: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if not supported[dtype]():
        pytest.skip(f"oneDNN has no {dtype} arithmetic on this processor")
    reorder = torch.ops.mkldnn._reorder_linear_weight
    layer = make_layer((450, 129, 200), rank, dtype)
    shrinks = {"shrink_packed": reorder(layer.A), "expand_packed": reorder(dense(layer.Bt.T))}
    y, q = call_forward(native, layer, reorder(layer.weight), **shrinks)
    expands = {"shrink_packed": reorder(layer.Bt), "expand_packed": reorder(dense(layer.A.T))}
    grads = call_backward(native, layer, q, reorder(dense(layer.weight.T)), **expands)
    assert_accurate(layer, "packed", (y, q, *grads))


# ---- an adapter per row --------------------------------------------------------------------------


def make_ids(kind: str, rows: int, adapters: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, adapters, (rows,), generator=generator)
    if kind == "sorted":
        return ids.sort().values
    if kind == "identical":
        return torch.full((rows,), adapters - 1)
    if kind == "some without":
        return ids.masked_fill(torch.rand(rows, generator=generator) < 0.4, -1)
    if kind == "all without":
        return torch.full((rows,), -1)
    if kind == "two present":
        return torch.where(ids % 2 == 0, 1, adapters - 2)
    return ids


ID_KINDS = ["shuffled", "sorted", "identical", "some without", "all without", "two present"]


@pytest.mark.parametrize("adapters", [4, 64])
@pytest.mark.parametrize("ids_kind", ID_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapter_per_row(native: Any, dtype: torch.dtype, ids_kind: str, adapters: int) -> None:
    for rows, rank in ((1, 4), (50, 20), (131, 25)):
        ids = make_ids(ids_kind, rows, adapters)
        layer = make_layer((rows, 65, 130), rank, dtype, ids=ids, adapters=adapters)
        for kind in ("packed", "panels", "base"):
            check_layer(native, layer, kind=kind)
        _, q = call_forward(native, layer, pack(layer.weight))
        dR = call_backward(native, layer, q, pack(layer.weight.T))[1]
        absent = torch.ones(adapters, dtype=torch.bool)
        absent[ids[ids >= 0]] = False
        assert torch.equal(dR[absent], torch.zeros_like(dR[absent]))


def test_rows_without_adapter_get_the_base(native: Any) -> None:
    layer = make_layer((6, 9, 7), 3, torch.float32, ids=torch.full((6,), -1), adapters=2)
    layer.R.fill_(torch.nan)
    base = torch.randn(6, 7)
    y, _ = call_forward(native, layer, None, base)
    assert torch.equal(y, base)


def test_groups_that_contradict_each_other(native: Any) -> None:
    """The kernels index memory by these: a wrong one must raise, not read out of bounds."""
    ids = torch.tensor([1, 0, -1, 1, 0, 1])
    layer = make_layer((6, 9, 7), 3, torch.float32, ids=ids, adapters=2)
    _, order, offsets = layer.groups
    assert order is not None
    assert offsets is not None

    def forward(*groups: torch.Tensor) -> Any:
        fixed = (layer.A, layer.R, layer.Bt, None, None, None, 0)
        return native.forward(layer.x, layer.weight, None, None, *fixed, *groups, 1.0, 0.0)

    forward(ids, order, offsets)
    beyond, twice = order.clone(), order.clone()
    beyond[-1] = 6
    twice[-1] = twice[-2]
    for groups, name in (
        ((ids + 1, order, offsets), "ids"),
        ((ids[:-1].clone(), order, offsets), "ids"),
        ((ids.int(), order, offsets), "ids"),
        ((ids, beyond, offsets), "order"),
        ((ids, twice, offsets), "order"),
        ((ids, order, offsets + 1), "offsets"),
        ((ids, order, offsets[:-1].clone()), "offsets"),
        ((ids, order, torch.tensor([0, 7, 6, 6])), "offsets"),
    ):
        with pytest.raises(RuntimeError, match=f"^{name}: "):
            forward(*groups)


# ---- dropout -------------------------------------------------------------------------------------


def philox4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11."""
    low = 0xFFFFFFFF
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & low, (p0 >> 32) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def expected_mask(seed: int, row_offset: int, rows: int, cols: int, p: float) -> torch.Tensor:
    low, threshold = 0xFFFFFFFF, int(p * 2**32)
    key = [seed & low, (seed >> 32) & low]
    counters = [(row_offset + row) * cols + col for row in range(rows) for col in range(cols)]
    words = [philox4x32_10([c & low, c >> 32, 0, 0], key)[0] for c in counters]
    kept = torch.tensor([word >= threshold for word in words], dtype=torch.bool)
    return kept.reshape(rows, cols)


def test_philox_known_answers() -> None:
    """Vectors of Random123's kat_vectors: the generator below the tests is the real one."""
    zeros = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox4x32_10([0] * 4, [0] * 2) == zeros
    assert philox4x32_10([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == ones


@pytest.mark.parametrize(
    ("seed", "row_offset", "rows", "cols", "p"),
    [
        (0, 0, 3, 7, 0.5),
        (-5, 2**31, 4, 33, 0.1),  # a negative seed, counters past 2^32
        (123456789012345, (2**32 - 20) // 19, 5, 19, 0.73),  # the low word wraps within a row
        (7, 0, 2, 1100, 0.25),
        (7, 0, 2, 5, 0.0),
        (7, 0, 2, 5, 1.0),
        (7, 3, 0, 5, 0.5),
    ],
)
def test_dropout_mask(
    native: Any, seed: int, row_offset: int, rows: int, cols: int, p: float
) -> None:
    mask = native.dropout_mask(torch.tensor([seed]), row_offset, rows, cols, p)
    assert torch.equal(mask, expected_mask(seed, row_offset, rows, cols, p))


@pytest.mark.parametrize(("first", "stride"), [(0, 40), (13, 40), (2**33 + 5, 41)])
def test_dropout_mask_of_a_block_of_columns(native: Any, first: int, stride: int) -> None:
    """A seed of three: key, counter of the first element, counters from row to row."""
    row, columns = first // stride, slice(first % stride, first % stride + 27)
    mask = native.dropout_mask(torch.tensor([77, first, stride]), 2, 6, 27, 0.4)
    assert torch.equal(mask, expected_mask(77, row + 2, 7, stride, 0.4).reshape(-1)[
        torch.arange(6)[:, None] * stride + torch.arange(27) + columns.start
    ])  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, "base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(native: Any, dtype: torch.dtype, kind: str) -> None:
    seed, row_offset = torch.tensor(99), 1000
    for shape, rank in (((1, 33, 20), 4), ((7, 129, 65), 20), ((130, 1100, 70), 12)):
        layer = make_layer(shape, rank, dtype)
        layer.dropout_p = 0.3
        layer.keep = native.dropout_mask(seed, row_offset, shape[0], shape[1], layer.dropout_p)
        check_layer(native, layer, kind=kind, seed=seed, row_offset=row_offset)


def test_dropout_by_row_blocks(native: Any) -> None:
    """The mask of a block depends on where its rows are in the whole, not in the block."""
    seed = torch.tensor(4)
    layer = make_layer((530, 4100, 9), 4, torch.bfloat16)
    layer.dropout_p = 0.5
    layer.keep = native.dropout_mask(seed, 0, 530, 4100, layer.dropout_p)
    check_layer(native, layer, seed=seed)


def test_dropping_everything(native: Any) -> None:
    layer = make_layer((5, 9, 7), 3, torch.float32)
    layer.dropout_p = 1.0
    base = torch.randn(5, 7)
    y, q = call_forward(native, layer, None, base, seed=torch.tensor(1))
    assert torch.equal(y, base)
    assert torch.equal(q, torch.zeros_like(q))


# ---- determinism, empty batches, gradients that are not needed -----------------------------------


@pytest.mark.parametrize("adapters", [0, 5])
def test_gradients_do_not_depend_on_threads_or_runs(native: Any, adapters: int) -> None:
    rows = 1501
    ids = make_ids("some without", rows, adapters) if adapters else None
    layer = make_layer((rows, 65, 130), 25, torch.float32, ids=ids, adapters=adapters)
    _, q = call_forward(native, layer, pack(layer.weight))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4, 2):
            torch.set_num_threads(count)
            results.append(call_backward(native, layer, q, None))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for value, first in zip(result, results[0], strict=True):
            assert torch.equal(value, first)


@pytest.mark.parametrize("adapters", [0, 3])
@pytest.mark.parametrize("kind", [*KINDS, "base"])
def test_no_rows(native: Any, kind: str, adapters: int) -> None:
    ids = torch.zeros(0, dtype=torch.int64) if adapters else None
    layer = make_layer((0, 9, 7), 3, torch.bfloat16, ids=ids, adapters=adapters)
    if kind == "base":
        y, q = call_forward(native, layer, None, torch.zeros(0, 7, dtype=torch.bfloat16))
        dx, dR, db = call_backward(native, layer, q, None)
    else:
        y, q = call_forward(native, layer, PREPARE[kind](layer.weight))
        dx, dR, db = call_backward(native, layer, q, PREPARE[kind](layer.weight.T))
    assert (y.shape, q.shape, dx.shape) == ((0, 7), (0, 3), (0, 9))
    assert torch.equal(dR, torch.zeros_like(layer.R))
    assert torch.equal(db, torch.zeros_like(layer.bias))


def test_only_the_gradients_that_are_needed(native: Any) -> None:
    layer = make_layer((9, 12, 8), 4, torch.float32)
    weight_t = pack(layer.weight.T)
    _, q = call_forward(native, layer, pack(layer.weight))
    everything = call_backward(native, layer, q, weight_t)
    for bits in range(8):
        needed = [bool(bits & bit) for bit in (1, 2, 4)]
        got = call_backward(native, layer, q, weight_t, needed=needed)
        for flag, value, want in zip(needed, got, everything, strict=True):
            assert torch.equal(value, want) if flag else value.shape == (0,)


# ---- arguments -----------------------------------------------------------------------------------

FLAT = make_layer((4, 9, 7), 3, torch.float32)
BASE = torch.zeros(4, 7)
NO_WEIGHT: dict[str, Any] = {"weight": None, "bias": None}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", {"x": FLAT.x.double()}),
        ("x", {"x": FLAT.x[:, :8]}),
        ("x", {"x": FLAT.x[0]}),
        ("A", {"A": FLAT.A.half()}),
        ("A", {"A": FLAT.A.T.contiguous().T}),
        ("A, Bt", {"A": FLAT.A[:2]}),
        ("Bt", {"Bt": FLAT.Bt.T}),
        ("weight", {"weight": FLAT.weight.T}),
        ("weight", {"weight": transposed(FLAT.weight)}),
        ("weight", {"weight": FLAT.weight[:6]}),
        ("weight", {"weight": pack(FLAT.weight.T)}),
        ("weight", {"weight": torch.zeros(1, 9, 5)}),
        ("weight", {"weight": torch.zeros(1, 9, 16, dtype=torch.float64)}),
        ("weight, base", NO_WEIGHT),
        ("weight, base", {"base": BASE}),
        ("bias", {"bias": FLAT.bias[:-1]}),
        ("bias", {"bias": FLAT.bias.bfloat16()}),
        ("bias", {"weight": None, "base": BASE}),
        ("base", {**NO_WEIGHT, "base": BASE[:3]}),
        ("base", {**NO_WEIGHT, "base": BASE.half()}),
        ("R", {"R": FLAT.R[:2]}),
        ("R", {"R": FLAT.R.half()}),
        ("R", {"R": FLAT.R.T}),
        ("ids, order, offsets", {"R": FLAT.R[None]}),
        ("shrink_packed", {"shrink_packed": FLAT.A}),
        ("shrink_packed", {"shrink_packed": pack(FLAT.weight)}),
        ("row_offset", {"row_offset": -1}),
        ("dropout_p", {"dropout_p": 1.5}),
        ("dropout_p", {"dropout_p": float("nan")}),
        ("seed", {"dropout_p": 0.5}),
        ("seed", {"dropout_p": 0.5, "seed": torch.tensor([1.0])}),
        ("seed", {"dropout_p": 0.5, "seed": torch.tensor([1, 2])}),
        ("seed", {"dropout_p": 0.5, "seed": torch.tensor([1, -1, 100])}),
        ("seed", {"dropout_p": 0.5, "seed": torch.tensor([1, 0, 1])}),
    ],
)
def test_a_bad_argument_is_named(native: Any, name: str, changes: dict[str, Any]) -> None:
    arguments = {
        "x": FLAT.x,
        "weight": pack(FLAT.weight),
        "bias": FLAT.bias,
        "base": None,
        "A": FLAT.A,
        "R": FLAT.R,
        "Bt": FLAT.Bt,
        "shrink_packed": None,
        "expand_packed": None,
        "seed": None,
        "row_offset": 0,
        "ids": None,
        "order": None,
        "offsets": None,
        "scaling": SCALING,
        "dropout_p": 0.0,
    }
    assert set(changes) <= set(arguments)
    native.forward(**arguments)
    with pytest.raises(RuntimeError, match=f"^{name}: expected"):
        native.forward(**(arguments | changes))


@pytest.mark.parametrize(
    "q", [torch.ones(3, 3), torch.ones(4, 3).half(), torch.ones(3, 4).T], ids=["rows", "dtype", "T"]
)
def test_a_bad_q_is_named(native: Any, q: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"^q: expected"):
        call_backward(native, FLAT, q, pack(FLAT.weight.T))


def test_the_instruction_set_is_reported(native: Any) -> None:
    known = ("avx512", "avx2", "generic")
    assert native.isa() in known
    limit = os.environ.get("LORAXS_CPU_ISA")
    if limit in known:
        assert known.index(native.isa()) >= known.index(limit)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 33), (65, 17), (700, 129), (1100, 64)])
@pytest.mark.parametrize("k", [1, 8, 16, 25])
def test_gram_rows(native: Any, shape: tuple[int, int], k: int) -> None:
    """x W^T W, at most twice the error of the two plain products; the same bits on one thread."""
    generator = torch.Generator().manual_seed(k)
    w = torch.randn(*shape, generator=generator)
    x = torch.randn(k, shape[1], generator=generator)
    exact = x.double() @ w.double().T @ w.double()
    got = native.gram_rows(x, w)
    eager, slack = error_of(x @ w.T @ w, exact), 2 * torch.finfo(x.dtype).eps * exact.abs().max()
    assert (error_of(got, exact) <= 2 * eager + slack).all()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(native.gram_rows(x, w), got)
    finally:
        torch.set_num_threads(threads)


def test_gram_rows_refuses(native: Any) -> None:
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    for bad in ((x.double(), w), (x, w.T), (x, w[:, :5].contiguous()), (x.T, w), (x[0], w)):
        with pytest.raises(RuntimeError, match="x"):
            native.gram_rows(*bad)
