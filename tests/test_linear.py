"""lora_xs_linear and lora_xs_update: values and gradients of every CPU path, by the rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import loraxs_kernels as lxk
from tests.oracle import (
    DTYPE_PAIRS,
    DTYPES,
    RANKS,
    SCALING,
    check,
    evaluate,
    make_problem,
    ours,
)

# (rows, in, out); up to 16 rows the compiled operators read the weight itself.
SMALL = [(1, 17, 3), (3, 33, 65), (17, 130, 41), (40, 65, 129)]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("dtype", "core"), DTYPE_PAIRS, ids=str)
def test_values_and_gradients(path: str, dtype: torch.dtype, core: torch.dtype, rank: int) -> None:
    seeds = {1: 8, 4: 3}.get(rank, 1)
    for rows, k, n in SMALL if rank <= 25 else SMALL[1:3]:
        problems = [
            make_problem(rows, k, n, rank, dtype=dtype, core=core, seed=s) for s in range(seeds)
        ]
        check(problems, backend=path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 736, 1504), (5, 1504, 736)])
def test_large_odd_shapes(path: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check(make_problem(*shape, 20, dtype=dtype, core=torch.float32), backend=path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["x", "slice", "expanded", "grad_y", "weight", "A", "B", "R"])
def test_strided_operands(path: str, dtype: torch.dtype, what: str) -> None:
    p = make_problem(21, 34, 18, 12, dtype=dtype)

    def transposed(t: Tensor) -> Tensor:
        other = t.detach().t().contiguous().t()
        assert not other.is_contiguous()
        return nn.Parameter(other, requires_grad=False) if isinstance(t, nn.Parameter) else other

    if what == "slice":
        p = p.change(x=torch.cat([p.x, p.x], 1)[:, 5:39])
    elif what == "expanded":
        p = p.change(x=p.x[:1].expand(21, 34), grad_y=p.grad_y[:, :1].expand(21, 18))
    else:
        p = p.change(**{what: transposed(getattr(p, what))})
    check(p, backend=path)


def test_gradient_of_a_sum(path: str) -> None:
    """The gradient of ``sum()`` is one number with stride 0."""
    p = make_problem(19, 12, 10, 4, dtype=torch.float32)
    p = p.change(grad_y=torch.ones(()).expand(19, 10))
    check(p, backend=path)


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (3, 1, 2)])
def test_leading_dimensions(path: str, lead: tuple[int, ...]) -> None:
    rows = torch.Size(lead).numel()
    p = make_problem(rows, 18, 10, 4, dtype=torch.float32)
    q = p.change(x=p.x.reshape(*lead, 18), grad_y=p.grad_y.reshape(*lead, 10))
    check(q, backend=path)
    got, flat = (evaluate(lambda a, l: ours(a, l, backend=path), a) for a in (q, p))
    assert got["y"].shape == (*lead, 10) and got["dx"].shape == (*lead, 18)
    for name in got:
        torch.testing.assert_close(got[name].reshape(flat[name].shape), flat[name])


@pytest.mark.parametrize("strides", ["transposed", "sliced"])
def test_strided_3d(path: str, strides: str) -> None:
    p = make_problem(12, 18, 10, 4, dtype=torch.float32)
    x, grad = p.x.reshape(3, 4, 18), p.grad_y.reshape(3, 4, 10)
    if strides == "transposed":
        x, grad = x.transpose(0, 1), grad.transpose(0, 1)
    else:
        x, grad = x[:, 1:3], grad[:, 1:3]
    check(p.change(x=x, grad_y=grad), backend=path)


@pytest.mark.parametrize("adapters", [None, 3])
@pytest.mark.parametrize("lead", [(0,), (2, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(
    path: str, lead: tuple[int, ...], dtype: torch.dtype, adapters: int | None
) -> None:
    p = make_problem(0, 8, 6, 4, dtype=dtype, adapters=adapters)
    ids = None if p.ids is None else p.ids.reshape(lead)
    p = p.change(x=p.x.reshape(*lead, 8), grad_y=p.grad_y.reshape(*lead, 6))
    got = evaluate(lambda q, l: ours(q, l, backend=path, adapter_ids=ids), p)
    assert got["y"].shape == (*lead, 6) and got["dx"].shape == (*lead, 8)
    assert got["dR"].shape == p.R.shape and not got["dR"].any() and not got["dbias"].any()


@pytest.mark.parametrize(("dtype", "core"), DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("adapters", [None, 3])
def test_update(path: str, dtype: torch.dtype, core: torch.dtype, adapters: int | None) -> None:
    p = make_problem(19, 33, 21, 12, dtype=dtype, core=core, adapters=adapters, update=True)
    assert p.base is not None
    before = p.base.clone()
    check(p, backend=path)
    assert torch.equal(p.base, before), "base_out was modified"
    got = evaluate(lambda q, l: ours(q, l, backend=path), p)
    assert torch.equal(got["dbase"], p.grad_y), "base_out gets the identity gradient"


def test_update_does_not_alias_base(path: str) -> None:
    """Also where the update is nothing, the result is a tensor of its own."""
    p = make_problem(4, 6, 5, 3, dtype=torch.float32, update=True)
    assert p.base is not None
    before = p.base.clone()
    y = lxk.lora_xs_update(p.base, p.x, p.A, p.R, p.B, scaling=0.0, backend=path)
    y.add_(1.0)
    assert torch.equal(p.base, before)


def test_update_with_leading_dimensions_and_a_strided_base(path: str) -> None:
    p = make_problem(12, 9, 7, 4, dtype=torch.float32, update=True)
    assert p.base is not None
    base = p.base.reshape(3, 4, 7).transpose(0, 1)
    q = p.change(
        base=base, x=p.x.reshape(3, 4, 9).transpose(0, 1), grad_y=p.grad_y.reshape(4, 3, 7)
    )
    check(q, backend=path)


def test_without_bias(path: str) -> None:
    p = make_problem(20, 12, 10, 4, dtype=torch.float32)
    y = lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B, backend=path)
    zero = lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B, torch.zeros(10), backend=path)
    torch.testing.assert_close(y, zero)


@pytest.mark.parametrize("scaling", [0, 0.0, -2.5, 1, 16.0])
def test_scaling(path: str, scaling: float) -> None:
    p = make_problem(20, 12, 10, 4, dtype=torch.float32)
    y = lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B, p.bias, scaling=scaling, backend=path)
    w = p.to(torch.float64)
    full = w.weight + scaling * (w.B @ w.R @ w.A)
    torch.testing.assert_close(y, torch.nn.functional.linear(w.x, full, w.bias).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needed", [("x",), ("R",), ("bias",), ("x", "R"), ("R", "bias")])
def test_only_what_is_needed(path: str, dtype: torch.dtype, needed: tuple[str, ...]) -> None:
    """A gradient is the same whether or not others are computed beside it."""
    p = make_problem(19, 12, 10, 4, dtype=dtype)
    full = evaluate(lambda q, l: ours(q, l, backend=path), p)
    leaves = {n: t.requires_grad_(n in needed) for n, t in p.leaves().items()}
    y = ours(p, leaves, backend=path)
    y.backward(p.grad_y)
    for name, leaf in leaves.items():
        if name in needed:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, full[f"d{name}"]), name
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("adapters", [None, 4])
def test_same_bits_from_run_to_run(path: str, adapters: int | None) -> None:
    p = make_problem(300, 40, 24, 12, dtype=torch.float32, adapters=adapters)
    first = evaluate(lambda q, l: ours(q, l, backend=path), p)
    for _ in range(2):
        again = evaluate(lambda q, l: ours(q, l, backend=path), p)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


def test_operands_are_left_alone(path: str) -> None:
    p = make_problem(20, 12, 10, 4, dtype=torch.bfloat16, core=torch.float32)
    operands = (p.x, p.weight, p.A, p.R, p.B, p.bias, p.grad_y)
    before = [(t.clone(), t._version) for t in operands]
    evaluate(lambda q, l: ours(q, l, backend=path), p)
    for now, (then, version) in zip(operands, before, strict=True):
        assert torch.equal(now, then) and now._version == version


def test_without_gradients(path: str) -> None:
    p = make_problem(20, 12, 10, 4, dtype=torch.float32)
    want = ours(p, p.leaves(), backend=path)
    with torch.no_grad():
        y = ours(p, p.leaves(), backend=path)
        assert not y.requires_grad
        assert torch.equal(y, want)
    with torch.inference_mode():
        y = ours(p, p.leaves(), backend=path)
        assert y.is_inference()
        assert torch.equal(y, want)


def test_equivalent_expression_of_the_docstring() -> None:
    p = make_problem(5, 12, 10, 4)
    y = lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B, p.bias, scaling=SCALING)
    plain = torch.nn.functional.linear(p.x, p.weight, p.bias)
    torch.testing.assert_close(y, plain + SCALING * (p.x @ p.A.T @ p.R.T @ p.B.T))


def test_nan_and_infinity_reach_the_output(path: str) -> None:
    """A row with NaN is NaN, and the other rows do not see it."""
    p = make_problem(20, 12, 10, 4, dtype=torch.float32)
    clean = ours(p, p.leaves(), backend=path).detach()
    x = p.x.clone()
    x[3, 2] = float("nan")
    y = ours(p.change(x=x), p.change(x=x).leaves(), backend=path).detach()
    assert y[3].isnan().all()
    others = [i for i in range(20) if i != 3]
    assert torch.equal(y[others], clean[others])
