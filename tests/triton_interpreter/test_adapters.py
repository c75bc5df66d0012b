"""A core per row: who is gathered for whom, in both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import loraxs_kernels as lxk
from loraxs_kernels.backends import flags
from tests.triton_interpreter.common import SCHEMES, Case, small_plan

ROWS = 29

#: What is tried with 64 adapters: the interpreter is slow.
MANY = [("raw", "distinct"), ("sorted", "zipf"), ("shuffled", "uniform")]


def _ids(kind: str, n: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    if kind == "identical":
        return torch.full((ROWS,), n - 1)
    if kind == "distinct":
        return torch.arange(ROWS) % n
    if kind == "uniform":
        return torch.randint(0, n, (ROWS,), generator=g)
    if kind == "zipf":
        weights = 1.0 / torch.arange(1, n + 1)
        return torch.multinomial(weights, ROWS, replacement=True, generator=g)
    assert kind == "some without"
    return torch.randint(-1, n, (ROWS,), generator=g)


@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "zipf", "some without"])
@pytest.mark.parametrize("order", ["sorted", "shuffled", "raw"])
@pytest.mark.parametrize("n", [1, 8, 64])
def test_ids(n: int, order: str, kind: str) -> None:
    if (n == 64 and (order, kind) not in MANY) or (
        n == 1 and kind not in ("identical", "some without")
    ):
        pytest.skip("little else than a smaller case")
    ids = _ids(kind, n)
    if order == "sorted":
        ids = ids.sort().values
    scheme = SCHEMES["ticket" if (n + len(kind)) % 2 else "resident"]
    chunks = 1 if n > 8 else 2
    # "raw": nobody has sorted the ids, as with a tensor of ids on the GPU.
    case = Case(ROWS, 33, 40, 12, torch.float32, adapters=n, ids=ids, sort=order != "raw")
    got = case.check(small_plan(scheme, chunks=chunks))
    absent = [a for a in range(n) if a not in ids]
    assert torch.equal(got["dR"][absent], torch.zeros(len(absent), 12, 12))


@pytest.mark.parametrize("scheme", ["resident", "ticket"])
def test_ids_with_dropout_wide_rank_and_wide_core(scheme: str) -> None:
    case = Case(37, 50, 70, 40, torch.float16, torch.float32, adapters=5, dropout_p=0.2, sort=True)
    case.check(small_plan(SCHEMES[scheme]))


@pytest.mark.parametrize("rows", [1, 20])
def test_few_rows_with_many_adapters(rows: int) -> None:
    """Serving: the chooser's plan, every row its own adapter out of a thousand."""
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:rows]
    Case(rows, 64, 70, 16, adapters=1000, ids=ids, need=(True, False, False)).check()


def test_hundreds_of_adapters_get_gradients() -> None:
    ids = torch.randint(-1, 200, (24,), generator=torch.Generator().manual_seed(0))
    case = Case(24, 32, 33, 5, adapters=200, ids=ids, sort=True)
    got = case.check(small_plan(SCHEMES["ticket"], chunks=1, BR=16, CL=16, CR=16, DJ=16))
    assert not got["dR"].isnan().any()


def test_an_id_out_of_range_counts_as_none_and_raises_later() -> None:
    ids = _ids("some without", 5)
    wrong = torch.where(ids == 3, torch.tensor(5_000_000_000), ids)
    wrong[0] = -7
    right = torch.where(ids == 3, -1, ids)
    right[0] = -1
    plan = small_plan(SCHEMES["ticket"])
    good = Case(ROWS, 33, 40, 12, adapters=5, ids=right).check(plan)
    flags.raise_bad_ids()

    bad = Case(ROWS, 33, 40, 12, adapters=5, ids=wrong)
    from loraxs_kernels.backends import triton as backend

    t = bad.tensors()
    y, q = backend.forward(
        t["x"], t["weight"], None, t["A"], t["R"], t["B"], t["bias"], None, wrong, None, None,
        0.7, 0.0, 0,
    )  # fmt: skip
    assert torch.equal(y, good["y"])
    with pytest.raises(ValueError, match=r"^adapter_ids: an earlier call"):
        backend.forward(
            t["x"], t["weight"], None, t["A"], t["R"], t["B"], None, None, right, None, None,
            0.7, 0.0, 0,
        )  # fmt: skip
    args = (wrong, None, None, 0.7, 0.0, True, True, False, 0)
    _, dR, _ = backend.backward(t["grad_y"], q, t["weight"], t["A"], t["R"], t["B"], None, *args)
    assert torch.equal(dR, good["dR"])
    with pytest.raises(ValueError, match=r"^adapter_ids: an earlier call"):
        flags.raise_bad_ids()


def test_a_batch_through_the_public_function() -> None:
    from tests import oracle

    p = oracle.problem(29, 33, 65, 12, adapters=5).to(torch.float32)
    W, A, B = oracle.frozen(p)
    assert p.ids is not None
    batch = lxk.AdapterBatch(p.ids, 5)
    f = lambda x, R, b: lxk.lora_xs_linear(  # noqa: E731
        x, W, A, R, B, b, scaling=oracle.S, adapter_ids=batch, backend="triton"
    )
    oracle.check((oracle.results(f, p), p.to(torch.float64), p))
