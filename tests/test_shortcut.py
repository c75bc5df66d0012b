"""Repeated plain calls on the CPU take fewer steps, and give what the long way gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraxs_kernels as lxk
from loraxs_kernels import _native, functional, shortcut
from loraxs_kernels.backends import onednn, reference

pytestmark = pytest.mark.skipif(
    _native.load() is not None or onednn.unavailable() is not None,
    reason="the shortcut leads to the compiled CPU operators",
)

ROWS = [1, 5, 16, 40, 600]


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry whenever a call goes the long way."""
    seen: list[int] = []
    check = functional._check_once

    def counted(*args: Any) -> None:
        seen.append(1)
        check(*args)

    monkeypatch.setattr(functional, "_check_once", counted)
    return seen


def make(dtype: torch.dtype = torch.float32, **options: Any) -> lxk.LoRAXSLinear:
    return lxk.LoRAXSLinear(40, 24, 6, r_std=0.3, dtype=dtype, **options)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def passes(layer: Callable[[Tensor], Tensor], x: Tensor, *leaves: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves], torch.ones_like(y).cumsum(-1))]


def close(got: Tensor, want: Tensor) -> None:
    """Sums of up to 40 numbers in another order: 40 eps of the largest, twice."""
    atol = 80 * torch.finfo(want.dtype).eps * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=0.0, atol=atol)


def settle(layer: lxk.LoRAXSLinear, x: Tensor) -> None:
    for _ in range(3):
        passes(layer, x, layer.R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
def test_the_same_bits_as_the_long_way(long_ways: list[int], rows: int, dtype: torch.dtype) -> None:
    layer, x = make(dtype), draw(rows, 40, dtype=dtype)
    first = passes(layer, x, layer.R)
    assert long_ways
    settle(layer, x)
    long_ways.clear()
    again = passes(layer, x, layer.R)
    with torch.no_grad():
        inference = layer(x)
    assert not long_ways
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(inference, first[0])


@pytest.mark.parametrize("shape", [(40,), (3, 5, 40), (2, 2, 2, 40)])
def test_any_number_of_dimensions(long_ways: list[int], shape: tuple[int, ...]) -> None:
    layer, x = make(), draw(*shape)
    settle(layer, x)
    long_ways.clear()
    y, dx, dR = passes(layer, x, layer.R)
    assert not long_ways
    want = layer.weight + layer.delta_weight()
    close(y, nn.functional.linear(x, want, layer.bias))
    assert dx.shape == x.shape and dR.shape == (6, 6)


@pytest.mark.parametrize("trained", ["x", "R", "bias", "R and bias", "x and bias"])
def test_what_is_asked_for(trained: str) -> None:
    layer = make()
    assert layer.bias is not None
    layer.bias.requires_grad_("bias" in trained)
    layer.R.requires_grad_("R" in trained)
    x = draw(5, 40).requires_grad_("x" in trained)
    leaves = [t for t in (x, layer.R, layer.bias) if t.requires_grad]

    def gradients(backend: str | None) -> tuple[Tensor, ...]:
        layer.backend = backend
        return torch.autograd.grad(layer(x).square().sum(), leaves)

    want = gradients("reference")
    for _ in range(4):
        for got, expected in zip(gradients(None), want, strict=True):
            close(got, expected)


CHANGES: dict[str, Callable[[lxk.LoRAXSLinear], Any]] = {
    "W in place": lambda m: m.weight.mul_(2),
    "A in place": lambda m: m.A.mul_(2),
    "B in place": lambda m: m.B.mul_(2),
    "W through .data": lambda m: setattr(m.weight, "data", m.weight.data * 2),
    "A replaced": lambda m: setattr(m, "A", m.A * 2),
    "R replaced": lambda m: setattr(m, "R", nn.Parameter(m.R.detach() * 2)),
    "R not contiguous": lambda m: setattr(m, "R", nn.Parameter(m.R.detach().t())),
    "bias replaced": lambda m: setattr(m, "bias", nn.Parameter(torch.ones(24))),
    "no bias": lambda m: setattr(m, "bias", None),
    "scaling": lambda m: setattr(m, "scaling", 2.5),
    "invalidated": lxk.invalidate_packed,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_seen(change: str) -> None:
    layer, x = make(), draw(5, 40)
    settle(layer, x)
    with torch.no_grad():
        CHANGES[change](layer)
    for got, want in zip(
        passes(layer, x, layer.R),
        passes(lambda x: reference_call(layer, x), x, layer.R),
        strict=True,
    ):
        close(got, want)


def reference_call(layer: lxk.LoRAXSLinear, x: Tensor) -> Tensor:
    return lxk.lora_xs_linear(
        x, layer.weight, layer.A, layer.R, layer.B, layer.bias,
        scaling=layer.scaling, backend="reference",
    )  # fmt: skip


def test_a_weight_that_changes_before_the_backward_is_an_error() -> None:
    layer, x = make(), draw(5, 40).requires_grad_()
    settle(layer, x)
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_reach_x_through_q() -> None:
    layer = make()
    x = draw(5, 40).requires_grad_()
    settle(layer, x)

    def second(layer: Callable[[Tensor], Tensor], R: Tensor) -> tuple[Tensor, ...]:
        (dR,) = torch.autograd.grad(layer(x).square().sum(), [R], create_graph=True)
        return torch.autograd.grad(dR.square().sum(), [x, R])

    got = second(layer, layer.R)
    want = second(lambda x: reference_call(layer, x), layer.R)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_what_is_not_plain_goes_the_long_way(long_ways: list[int]) -> None:
    layer, x = make(), draw(5, 40)
    settle(layer, x)
    want = layer(x)

    class Own(Tensor):
        pass

    long_ways.clear()
    calls: list[Callable[[], Any]] = [
        lambda: layer(x.as_subclass(Own)),
        lambda: torch.func.vmap(layer)(x.unsqueeze(0)),
        lambda: torch.func.jvp(layer, (x,), (x,)),
        lambda: lxk.lora_xs_linear(x, layer.weight, layer.A, layer.R, layer.B, dropout_p=0.5),
    ]
    for n, call in enumerate(calls, 1):
        call()
        assert len(long_ways) == n
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert len(long_ways) == len(calls) + 1
    assert torch.equal(layer(x), want)
    assert len(long_ways) == len(calls) + 1


def test_backward_inside_autocast_keeps_the_dtypes() -> None:
    layer, x = make(), draw(5, 40).requires_grad_()
    settle(layer, x)
    want = passes(layer, x, layer.R)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, [x, layer.R], torch.ones_like(y).cumsum(-1))
    for a, b in zip(got, want[1:], strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def with_a_name_as_core(layer: lxk.LoRAXSLinear) -> Tensor:
    core: Any = "R"
    return lxk.lora_xs_linear(draw(5, 40), layer.weight, layer.A, core, layer.B)


@pytest.mark.parametrize(
    ("wrong", "error", "name"),
    [
        (lambda m: m(draw(5, 39)), ValueError, "x"),
        (lambda m: m(draw(5, 40).double()), TypeError, "weight|A"),
        (lambda m: m("x"), TypeError, "x"),
        (lambda m: lxk.lora_xs_linear(draw(5, 40), m.weight, m.A, m.R[:5], m.B), ValueError, "R"),
        (with_a_name_as_core, TypeError, "R"),
        (
            lambda m: lxk.lora_xs_linear(draw(5, 40), m.weight, m.A, m.R, m.B, draw(23)),
            ValueError,
            "bias",
        ),
        (
            lambda m: lxk.lora_xs_linear(draw(5, 40), m.weight, m.A, m.R, m.B, backend="none"),
            ValueError,
            "backend",
        ),
    ],
)
def test_a_wrong_argument_after_right_ones(
    wrong: Callable[[lxk.LoRAXSLinear], Any], error: type[Exception], name: str
) -> None:
    layer = make()
    settle(layer, draw(5, 40))
    for _ in range(2):
        lxk.lora_xs_linear(draw(5, 40), layer.weight, layer.A, layer.R, layer.B)
    with pytest.raises(error, match=f"^({name}):"):
        wrong(layer)


def test_a_weight_that_begins_to_train_gets_its_gradient() -> None:
    layer, x = make(), draw(5, 40)
    settle(layer, x)
    layer.weight.requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    y, _ = reference.forward(
        x, layer.weight, None, layer.A, layer.R, layer.B, layer.bias,
        None, None, None, None, layer.scaling, 0.0, 0,
    )  # fmt: skip
    (want,) = torch.autograd.grad(y.sum(), layer.weight)
    close(layer.weight.grad, want)


def test_copies_are_dropped_with_their_layer() -> None:
    import gc
    import weakref

    layer, x = make(), draw(5, 40)
    settle(layer, x)
    seen = [weakref.ref(t) for t in (layer.weight, layer.A, layer.B)]
    del layer
    gc.collect()
    assert all(ref() is None for ref in seen)
    assert shortcut.run(x, x, x, x, x, None, 1.0, 1, None) is None
