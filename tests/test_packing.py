"""The side cache of packed copies."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loraxs_kernels as lxk
from loraxs_kernels.backends import onednn, packing
from tests.oracle import frozen, problem


def held(layer: nn.Module) -> int:
    return sum(
        len(packing._entries[id(t)].copies)
        for t in (*layer.parameters(), *layer.buffers())
        if id(t) in packing._entries
    )


def rows_of(layer: lxk.LoRAXSLinear) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(40, layer.in_features, generator=g, dtype=layer.weight.dtype)


def expected(layer: lxk.LoRAXSLinear) -> Tensor:
    return F.linear(rows_of(layer), layer.weight + layer.delta_weight(), layer.bias)


@pytest.mark.parametrize("change", ["copy_", "load_state_dict", "merge", "replace", "double"])
def test_packed_copies_follow_the_weight(change: str) -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4, r_std=0.1)
    torch.testing.assert_close(layer(rows_of(layer)), expected(layer))
    assert held(layer) > 0
    other = lxk.LoRAXSLinear(24, 20, 4, r_std=0.1)
    with torch.no_grad():
        if change == "copy_":
            layer.weight.copy_(other.weight)
        elif change == "load_state_dict":
            layer.load_state_dict(other.state_dict())
        elif change == "merge":
            before = layer.weight.clone()
            want = expected(layer)
            layer.merge()
            torch.testing.assert_close(layer(rows_of(layer)), want)
            layer.unmerge()
            assert torch.equal(layer.weight, before)
        elif change == "replace":
            layer.weight = nn.Parameter(other.weight.clone(), requires_grad=False)
        else:
            layer.double()
    torch.testing.assert_close(layer(rows_of(layer)), expected(layer))


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("rows", [3, 40, 200])
def test_copies_follow_the_bases(name: str, rows: int) -> None:
    """Both passes, for few rows and many; in place, by another tensor, and unseen by PyTorch."""
    torch.manual_seed(0)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    layer = lxk.LoRAXSLinear(24, 20, 4, r_std=0.1)
    x = torch.randn(rows, 24, requires_grad=True)

    def check() -> None:
        y = layer(x)
        dx, dR = torch.autograd.grad(y.sum(), (x, layer.R))
        W = layer.weight + layer.delta_weight()
        close(y, F.linear(x, W, layer.bias))
        close(dx, W.sum(0).expand_as(x))
        close(dR, layer.B.sum(0).outer((x.detach() @ layer.A.T).sum(0)))

    check()
    getattr(layer, name).mul_(2.0)
    check()
    setattr(layer, name, torch.randn_like(getattr(layer, name)))
    check()
    getattr(layer, name).data.add_(1.0)
    lxk.invalidate_packed(layer)
    check()


@pytest.mark.parametrize("rows", [3, 40, 300])
@pytest.mark.parametrize("update", [False, True])
def test_nothing_keeps_frozen_tensors_alive(rows: int, update: bool) -> None:
    """However the product is computed: streamed, packed, or by torch; both passes."""
    p = problem(rows, 24, 20, 4).to(torch.float32)
    weight, A, B = frozen(p)
    x = p.x.requires_grad_()
    for _ in range(2):
        if update:
            y = lxk.lora_xs_update(p.grad_y, x, A, p.R, B)
        else:
            y = lxk.lora_xs_linear(x, weight, A, p.R, B)
        y.sum().backward()
    refs = [weakref.ref(t) for t in (weight, A, B)]
    keys = [id(t) for t in (weight, A, B)]
    del weight, A, B, y, _
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    assert not any(key in packing._entries for key in keys)


def test_a_change_while_a_copy_is_made_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4, r_std=0.1)
    make = packing.MAKERS["dense_t"]

    def interrupted(matrix: Tensor, dtype: torch.dtype) -> Tensor:
        copy = make(matrix, dtype)
        layer.B.mul_(2.0)  # as another thread might
        return copy

    monkeypatch.setitem(packing.MAKERS, "dense_t", interrupted)
    layer(rows_of(layer))
    monkeypatch.setitem(packing.MAKERS, "dense_t", make)
    torch.testing.assert_close(layer(rows_of(layer)), expected(layer))


def test_packed_copies_die_with_the_weight_and_break_nothing() -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4)
    x = rows_of(layer)
    y = layer(x)
    assert set(layer.state_dict()) == {"weight", "bias", "A", "B", "S", "R"}
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), y)
    layer.share_memory()
    torch.testing.assert_close(layer(x), y)
    key = id(layer.weight)
    assert key in packing._entries
    del layer, y
    gc.collect()
    assert key not in packing._entries


def test_packing_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4, prepack=False)
    want = expected(layer)
    torch.testing.assert_close(layer(rows_of(layer)), want)
    assert held(layer) == 0
    monkeypatch.setenv("LORAXS_PREPACK", "0")
    layer.prepack = True
    torch.testing.assert_close(layer(rows_of(layer)), want)
    assert held(layer) == 0


@pytest.mark.parametrize("stored", ["by rows", "by columns", "with gaps"])
@pytest.mark.parametrize("rows", [40, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_need_no_copy_of_the_weight(dtype: torch.dtype, rows: int, stored: str) -> None:
    """The own product packs W on the way, if W lies without gaps."""
    if not onednn.own_product(dtype):
        pytest.skip("oneDNN does the product on this processor, from packed copies")
    layer = lxk.LoRAXSLinear(24, 20, 4, r_std=0.1).to(dtype)
    weight = layer.weight.detach()
    if stored == "by columns":
        weight = weight.t().contiguous().t()
    elif stored == "with gaps":
        weight = F.pad(weight, (0, 8))[:, :24]
    x = torch.randn(rows, 24, dtype=dtype, requires_grad=True)
    results = []
    for w in (layer.weight, weight):
        for _ in range(3):  # packed at the second meeting, remembered for the third
            y = lxk.lora_xs_linear(x, w, layer.A, layer.R, layer.B)
            grads = torch.autograd.grad(y.sum(), (x, layer.R))
        results.append((y, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    copied = {kind for kind in packing.MAKERS if packing.has(weight, kind, torch.float32)}
    in_place = rows == 200 and stored != "with gaps"
    assert copied == (set() if in_place else {"panels", "panels_t"})


def test_what_is_never_packed() -> None:
    p = problem(40, 24, 20, 4).to(torch.float32)
    lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B)
    assert not packing._entries[id(p.weight)].copies, "a tensor met for the first time"
    lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B)
    assert packing._entries[id(p.weight)].copies
    with torch.inference_mode():
        w = p.weight.clone()
        lxk.lora_xs_linear(p.x, w, p.A, p.R, p.B)
        lxk.lora_xs_linear(p.x, w, p.A, p.R, p.B)
    assert not packing.packable(w) and id(w) not in packing._entries
    assert not packing.packable(nn.Parameter(p.weight))


def test_invalidate_packed() -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4, r_std=0.1)
    layer(rows_of(layer))
    layer.weight.data.add_(1.0)
    lxk.invalidate_packed(layer)
    torch.testing.assert_close(layer(rows_of(layer)), expected(layer))
    with pytest.raises(TypeError, match="module"):
        lxk.invalidate_packed(3)  # type: ignore[arg-type]
