"""The module, its injection into models, merging, and the factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import loraxs_kernels as lxk
from tests.models import Net, X, config


def test_inject_and_eject() -> None:
    net = Net()
    net.value.bias.requires_grad_(False)
    weight, y = net.query.weight, net(X)
    assert lxk.inject_lora_xs(net, config(r_init="zeros", rank_pattern={"value": 7})) is net
    torch.testing.assert_close(net(X), y)
    assert net.again is net.query and isinstance(net.query, lxk.LoRAXSLinear)
    assert net.query.weight is weight
    assert isinstance(net.value, lxk.LoRAXSLinear)
    assert (net.query.rank, net.value.rank, net.value.scaling) == (4, 7, 8 / 7)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {"query.R", "value.R", "classifier.weight", "classifier.bias"}
    lxk.eject_lora_xs(net)
    assert type(net.query) is nn.Linear and net.query.weight is weight and net.again is net.query
    frozen_now = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert frozen_now == {"value.bias"}
    assert torch.equal(net(X), y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["qeury"]}, "target_modules.*'query'"),
        ({"rank": 30}, "query: rank"),
        ({"modules_to_save": ["klassifier"]}, "modules_to_save.*'classifier'"),
        ({"rank_pattern": {"velue": 3}}, "rank_pattern.*'value'"),
    ],
)
def test_failed_injection_leaves_the_model_alone(changes: dict[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        lxk.inject_lora_xs(net, config(**changes))
    assert not any(isinstance(m, lxk.LoRAXSLinear) for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_attention_out_proj_is_refused() -> None:
    net = nn.TransformerEncoderLayer(16, 2)
    with pytest.raises(ValueError, match="subclass"):
        lxk.inject_lora_xs(net, lxk.LoRAXSConfig(2, target_modules="out_proj"))


def test_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(20, 12)
    net = nn.Sequential(conv)
    x, weight = torch.randn(5, 12), conv.weight.detach().clone()
    y = net(x)
    lxk.inject_lora_xs(net, lxk.LoRAXSConfig(3, target_modules="0", r_init="zeros"))
    torch.testing.assert_close(net(x), y)
    lxk.eject_lora_xs(net)
    back = net.get_parameter("0.weight")
    assert type(net.get_submodule("0")) is Conv1D and torch.equal(back, weight)
    assert torch.equal(net(x), y)


def test_to_lora_and_delta_weight() -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4, alpha=8.0, r_std=1.0)
    lora_A, lora_B = layer.to_lora()
    torch.testing.assert_close(lora_B @ lora_A, layer.delta_weight())
    torch.testing.assert_close(layer.delta_weight(), 2.0 * layer.B @ layer.R.detach() @ layer.A)
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.unmerge()


def test_use_adapters() -> None:
    net = Net()
    lxk.inject_lora_xs(net, config(num_adapters=3))
    ids = torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, 1, 1])
    with pytest.raises(ValueError, match="adapter_ids"):
        net(X)
    with lxk.use_adapters(net, ids) as batch:
        y = net(X)
        with lxk.use_adapters(net, [-1] * 10):
            base = net(X)
        assert torch.equal(net(X), y)
    assert isinstance(batch, lxk.AdapterBatch)
    torch.testing.assert_close(y[3], base[3])
    assert isinstance(net.query, lxk.LoRAXSLinear) and net.query.active_ids is None
    lxk.eject_lora_xs(net)
    torch.testing.assert_close(net(X), base)


@pytest.mark.parametrize("sigma", ["A", "B", "both", "none"])
@pytest.mark.parametrize("sign", ["u", "v", None])
def test_factors(sigma: str, sign: str | None) -> None:
    W = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    f = lxk.lora_xs_factors(W, 20, sigma=sigma, sign=sign)
    middle = torch.diag(f.S) if sigma == "none" else torch.eye(20)
    full = f.B @ middle @ f.A
    torch.testing.assert_close(full, W, rtol=1e-4, atol=1e-4)
    if sign == "u":
        U = f.B / f.B.norm(dim=0)
        assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    if sign == "v":
        V = f.A / f.A.norm(dim=1, keepdim=True)
        assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.equal(f.R, lxk.lora_xs_factors(W, 20).R)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_layer_saves_the_weight_without_the_adapter(dtype: torch.dtype) -> None:
    layer = lxk.LoRAXSLinear(24, 20, 4, r_std=0.3, dtype=dtype)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge()
    merged = layer.state_dict()
    assert all(torch.equal(merged[name], value) for name, value in before.items())
    with pytest.raises(RuntimeError, match="merged"):
        layer.load_state_dict(before)
    layer.unmerge()
    assert torch.equal(layer.weight, before["weight"])


def test_only_one_layer_is_merged_into_a_shared_weight() -> None:
    first, second = (lxk.LoRAXSLinear(8, 8, 2, r_std=0.3) for _ in range(2))
    second.weight = first.weight
    before = first.weight.clone()
    first.merge()
    with pytest.raises(RuntimeError, match="shares the weight"):
        second.merge()
    first.unmerge()
    second.merge()
    second.unmerge()
    assert torch.equal(first.weight, before)


def test_meta_layers_have_shapes() -> None:
    layer = lxk.LoRAXSLinear(8, 6, 2, device="meta")
    assert layer(torch.empty(3, 8, device="meta")).shape == (3, 6)
