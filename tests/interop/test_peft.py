"""LoRA-XS as a PEFT method: training, files, adapters, merging, quantized bases; its kin there."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraxs_kernels import lora_xs_factors
from loraxs_kernels.checkpoint import fingerprint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from loraxs_kernels.interop import _layers, _peft_version  # noqa: E402
from loraxs_kernels.interop.peft import LoRAXSConfig, LoRAXSLayer, accelerate  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(24, 40)
        self.dense = nn.Linear(40, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.head(self.dense(torch.tanh(self.query(x))))


def base(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def config(**changes: Any) -> LoRAXSConfig:
    values: dict[str, Any] = {
        "r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"], "r_std": 0.3,
    }  # fmt: skip
    return LoRAXSConfig(**{**values, **changes})


def made(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return peft.get_peft_model(base(dtype), config(**changes))


def layers(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, LoRAXSLayer))


X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))


def close(value: Tensor, peer: Tensor, truth: Tensor) -> None:
    """The tolerance rule of tests/oracle.py for one tensor: ``truth`` is float64."""
    assert value.dtype == peer.dtype and value.shape == peer.shape
    slack = 2 * torch.finfo(value.dtype).eps * truth.abs().max()
    assert (value - truth).abs().max() <= 2 * (peer - truth).abs().max() + slack


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operations that layers call from now on."""
    calls: list[str] = []

    def wrap(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(real.__name__)
            return real(*args, **kwargs)

        return call

    for name in ("lora_xs_linear", "lora_xs_update"):
        monkeypatch.setattr(_layers, name, wrap(getattr(_layers, name)))
    return calls


# ---------------------------------------------------------------------------------- computing


def eager(layer: Any, x: Tensor, R: Tensor, name: str = "default") -> Tensor:
    """What one layer computes, written out; a core in float32 is applied in float32."""
    A, B = layer.lora_A[name].weight.to(x.dtype), layer.lora_B[name].weight.to(x.dtype)
    weight, bias = layer.base_layer.weight.to(x.dtype), layer.base_layer.bias.to(x.dtype)
    q = (x @ A.T).to(R.dtype) @ R.T
    return F.linear(x, weight, bias) + layer.scaling[name] * (q.to(x.dtype) @ B.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients(dtype: torch.dtype) -> None:
    layer = next(layers(made(dtype)))
    core = layer.lora_R["default"]
    assert core.dtype == torch.float32 and layer.lora_A["default"].weight.dtype == dtype

    def run(f: Any, x: Tensor, R: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().clone().requires_grad_()
        y = f(leaf, R)
        return (y, *torch.autograd.grad(y.square().sum(), (leaf, R)))

    x = X.to(dtype)
    wide = core.detach().double().requires_grad_()
    truth = run(lambda x, R: eager(layer, x, R), x.double(), wide)
    peer = run(lambda x, R: eager(layer, x, R), x, core)
    got = run(lambda x, R: layer(x), x, core)
    for value, other, exact in zip(got, peer, truth, strict=True):
        close(value, other, exact)


def test_dropout_only_while_training() -> None:
    model = made(lora_dropout=0.5)
    model.eval()
    plain = model(X)
    torch.testing.assert_close(plain, made()(X))
    model.train()
    assert not torch.allclose(model(X), plain)


@pytest.mark.parametrize("sigma", ["A", "B", "both", "none"])
@pytest.mark.parametrize("sign", ["u", "v"])
def test_conventions(sigma: str, sign: str) -> None:
    model = made(sigma=sigma, sign=sign, r_init="singular", seed=3)
    for layer in layers(model):
        weight = layer.base_layer.weight
        want = lora_xs_factors(weight, 4, sigma=sigma, sign=sign, r_init="singular", seed=3)
        assert torch.equal(layer.lora_A["default"].weight, want.A)
        assert torch.equal(layer.lora_B["default"].weight, want.B)
        assert torch.equal(layer.lora_R["default"], want.R)


def test_ranks_scalings_and_starts() -> None:
    model = made(
        rank_pattern={"dense": 7}, alpha_pattern={"query": 2}, use_rslora=True, r_init="normal"
    )
    query, dense = layers(model)
    assert query.lora_R["default"].shape == (4, 4) and query.scaling["default"] == 2 / 4**0.5
    assert dense.lora_R["default"].shape == (7, 7) and dense.scaling["default"] == 6 / 7**0.5
    query, dense = layers(made())
    assert not torch.equal(query.lora_R["default"], dense.lora_R["default"])


def test_only_the_core_trains() -> None:
    model = made(modules_to_save=["head"])

    def trained() -> set[str]:
        return {n.removeprefix("base_model.model.") for n, p in model.named_parameters()
                if p.requires_grad}  # fmt: skip

    want = {f"{n}.lora_R.default" for n in ("query", "dense")}
    want |= {f"head.modules_to_save.default.{n}" for n in ("weight", "bias")}
    assert trained() == want
    model.set_adapter("default")
    assert trained() == want
    bases = [b for n, b in model.named_buffers() if "lora_A" in n or "lora_B" in n]
    assert len(bases) == 4 and not any(b.requires_grad for b in bases)


# ---------------------------------------------------------------------------------- adapters


def two(**changes: Any) -> Any:
    """Two adapters with cores of their own; their bases are shared unless ``changes`` differ."""
    model = made()
    model.add_adapter("other", config(**changes))
    for layer in layers(model):
        if "other" in layer.lora_R:
            nn.init.normal_(layer.lora_R["other"], std=0.4)
    return model.eval()


def outputs(model: Any, x: Tensor) -> dict[str, Tensor]:
    found = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        found[name] = model(x)
    with model.disable_adapter():
        found["__base__"] = model(x)
    return found


@pytest.mark.parametrize(
    "changes", [{}, {"sigma": "B"}, {"r": 3}, {"target_modules": ["query"]}, {"lora_alpha": 1}]
)
def test_mixed_batches(changes: dict[str, Any]) -> None:
    model = two(**changes)
    single = outputs(model, X)
    assert not torch.allclose(single["default"], single["other"])
    torch.testing.assert_close(single["__base__"], base()(X))
    names = ["default", "other", "__base__", "other"]
    y = model(torch.cat([X, X]), adapter_names=names)
    for i, name in enumerate(names):
        torch.testing.assert_close(y[i], single[name][i % 2], rtol=1e-5, atol=1e-5)


def test_adapters_with_equal_bases_share_them_and_run_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = two()
    for layer in layers(model):
        assert layer.lora_A["default"].weight is layer.lora_A["other"].weight
        assert layer.lora_B["default"].weight is layer.lora_B["other"].weight
    calls = counted(monkeypatch)
    model(X, adapter_names=["other", "default"])
    assert calls == ["lora_xs_linear"] * 2


def test_set_and_delete_adapters() -> None:
    model = two()
    model.set_adapter("other")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 and all(n.endswith("lora_R.other") for n in trained)
    want = outputs(model, X)["default"]
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(X), want)
    assert not [n for n in model.state_dict() if "other" in n]
    for layer in layers(model):
        for names in (layer.lora_R, layer.lora_A, layer.lora_S, layer.scaling, layer.r):
            assert list(names) == ["default"]


def test_two_active_adapters_add_up() -> None:
    model = two()
    query = next(layers(model))
    x = X
    parts = [query.get_delta_weight(name) for name in ("default", "other")]
    model.base_model.set_adapter(["default", "other"])
    want = F.linear(x, query.base_layer.weight + sum(parts), query.base_layer.bias)
    torch.testing.assert_close(query(x), want, rtol=1e-5, atol=1e-5)


def test_merging() -> None:
    model = made()
    want = model(X)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert type(merged.query) is nn.Linear
    torch.testing.assert_close(merged(X), want, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        model.add_adapter("other", config())
    with pytest.raises(ValueError, match="merged"):
        next(layers(model))(X, adapter_names=["default", "default"])
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-5)
    assert torch.allclose(model.unload()(X), base()(X), atol=1e-6)


def test_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.c_attn = Conv1D(40, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.c_attn(x)

    model = peft.get_peft_model(GPT(), config(target_modules=["c_attn"], fan_in_fan_out=True))
    layer = next(layers(model))
    delta = layer.get_delta_weight("default")
    assert delta.shape == layer.base_layer.weight.shape == (24, 40)
    want = X @ (layer.base_layer.weight + delta) + layer.base_layer.bias
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(X), want, rtol=1e-5, atol=1e-5)


def test_injecting_without_a_wrapper() -> None:
    model = peft.inject_adapter_in_model(config(), base())
    torch.testing.assert_close(model(X), made()(X))


# ---------------------------------------------------------------------------------- files


def keys(folder: Path) -> set[str]:
    return {k.rpartition("base_model.model.")[2]
            for k in load_file(folder / "adapter_model.safetensors")}  # fmt: skip


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_saved_and_loaded(tmp_path: Path, embed: bool, low: bool) -> None:
    model = made(embed_bases=embed)
    model.save_pretrained(tmp_path)
    want = {f"{n}.{k}" for n in ("query", "dense") for k in ("lora_R", "lora_about")}
    if embed:
        want |= {f"{n}.{k}.weight" for n in ("query", "dense") for k in ("lora_A", "lora_B")}
    assert keys(tmp_path) == want
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(loaded(X), model(X))
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.load_adapter(tmp_path, "other", is_trainable=True)
    loaded.set_adapter("other")
    assert torch.equal(loaded(X), model(X))


def test_a_core_over_sixteen_bit_weights_keeps_its_bits(tmp_path: Path) -> None:
    model = made(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = peft.PeftModel.from_pretrained(
            base(torch.bfloat16), tmp_path, low_cpu_mem_usage=low
        )
        for a, b in zip(layers(loaded), layers(model), strict=True):
            assert torch.equal(a.lora_R["default"], b.lora_R["default"])


def test_other_signs_of_the_bases_are_repaired(tmp_path: Path) -> None:
    """As after another LAPACK: same weight, same settings, vectors with other signs."""
    model = made()
    want = model(X)
    flip = torch.tensor([1.0, -1.0, -1.0, 1.0])
    for layer in layers(model):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer._turn("default", torch.diag(flip).double())
        assert torch.equal(layer.lora_A["default"].weight, flip[:, None] * A)
        assert torch.equal(layer.lora_B["default"].weight, B * flip)
        core = layer.lora_R["default"]
        core.data = flip[:, None] * core.data * flip
        found = fingerprint(layer.lora_A["default"].weight, layer.lora_S["default"])
        layer._set_about("default", {**layer.about("default"), **found})
    torch.testing.assert_close(model(X), want)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(loaded(X), want)
    for a, b in zip(layers(loaded), layers(model), strict=True):
        assert torch.equal(a.lora_R["default"], b.lora_R["default"])
    loaded.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "again")
    torch.testing.assert_close(again(X), want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 5, "lora_alpha": 7.5}, r"rank 4, expected 5"),
        ({"lora_alpha": 8}, r"scaling 1.5, expected 2.0.*convert"),
        ({"sigma": "B"}, r"sigma 'A', expected 'B'.*convert"),
        ({"sign": "v"}, r"sign 'u', expected 'v'.*convert"),
        ({"subspace": "bottom"}, r"subspace 'top', expected 'bottom'"),
        ({"target_modules": ["query"]}, r"no such LoRA-XS layer: .*dense"),
        ({"target_modules": ["query", "dense", "head"], "r": 3}, r"no lora_R for .*head|rank"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made().save_pretrained(tmp_path)
    model = made(**changes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_base_weight_is_refused(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    other = base()
    with torch.no_grad():
        other.dense.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match=r"dense.*base weight"):
        peft.PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match=r"base weight.*dtype"):
        peft.PeftModel.from_pretrained(base(torch.bfloat16), tmp_path)
    made(embed_bases=True, check_base=False).save_pretrained(tmp_path / "embedded")
    loaded = peft.PeftModel.from_pretrained(base(torch.bfloat16), tmp_path / "embedded")
    torch.testing.assert_close(loaded(X.bfloat16()).float(), made()(X), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("what", ["no about", "bad about", "a core missing", "another shape"])
def test_damaged_files_are_refused(tmp_path: Path, what: str) -> None:
    made().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state, name = load_file(file), "base_model.model.dense."
    if what == "no about":
        del state[name + "lora_about"]
    elif what == "bad about":
        state[name + "lora_about"] = torch.zeros(4, dtype=torch.uint8)
    elif what == "a core missing":
        del state[name + "lora_R"]
    else:
        state[name + "lora_R"] = torch.zeros(5, 5)
    save_file(state, file)
    with pytest.raises(ValueError, match=r"lora_about|no lora_R|shape"):
        peft.PeftModel.from_pretrained(base(), tmp_path)


_STOCK = """
import sys, peft, torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.dense = torch.nn.Linear(24, 40), torch.nn.Linear(40, 24)
for load in (peft.PeftConfig.from_pretrained, peft.LoraConfig.from_pretrained,
             lambda folder: peft.PeftModel.from_pretrained(Net(), folder)):
    try:
        load(sys.argv[1])
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("LOADED")
assert not [name for name in sys.modules if name.startswith("loraxs")]
"""


def test_peft_alone_refuses_the_files(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORAXS"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _STOCK, str(tmp_path)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 3
    assert all("LORAXS" in line for line in run.stdout.splitlines())


# ---------------------------------------------------------------------------------- quantized bases


class Int8(nn.Parameter):
    """An 8-bit weight with one scale for each row."""

    scale: Tensor

    @staticmethod
    def of(weight: Tensor) -> Int8:
        scale = weight.abs().amax(1, keepdim=True) / 127
        quantized = nn.Parameter.__new__(Int8, (weight / scale).round().to(torch.int8), False)
        quantized.scale = scale
        return quantized

    def dequantize(self) -> Tensor:
        return self.detach().as_subclass(Tensor).float() * self.scale


class QuantLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = Int8.of(linear.weight.detach()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize().to(x.dtype), self.bias)


def quantized() -> Net:
    net = base()
    net.query, net.dense = QuantLinear(net.query), QuantLinear(net.dense)  # type: ignore[assignment]
    return net


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_quantized_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(quantized(), config())
    calls = counted(monkeypatch)
    y = model(X)
    assert calls == ["lora_xs_update"] * 2
    query = next(layers(model))
    dense = query.base_layer.weight.dequantize()
    want = lora_xs_factors(dense, 4)
    assert torch.equal(query.lora_A["default"].weight, want.A)
    merged = F.linear(X, dense + query.get_delta_weight("default"), query.base_layer.bias)
    torch.testing.assert_close(query(X), merged, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert all(layer.lora_R["default"].grad.abs().sum() > 0 for layer in layers(model))
    with pytest.raises(TypeError, match=r"merge.*quantized QuantLinear"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(), tmp_path)
    torch.testing.assert_close(loaded(X), y)
    with pytest.raises(ValueError, match="embed_bases=True"):
        peft.PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_bitsandbytes(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    net = base()
    for name, linear in (("query", net.query), ("dense", net.dense)):
        wrapped = getattr(bnb.nn, kind)(linear.in_features, linear.out_features)
        wrapped.load_state_dict(linear.state_dict())
        setattr(net, name, wrapped)
    try:
        plain = net.to("cpu")(X)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes cannot run {kind} on this machine: {error}")
    model = peft.get_peft_model(net, config())
    y = model(X)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), plain)
    assert not torch.allclose(y, plain)
    y.sum().backward()
    assert all(layer.lora_R["default"].grad.abs().sum() > 0 for layer in layers(model))


# ---------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_bias": True}, "lora_bias"),
        ({"sigma": "C"}, "sigma"),
        ({"sign": "w"}, "sign"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_wrong_layers_and_ranks() -> None:
    with pytest.raises(ValueError, match=r"rank: got 25"):
        made(r=25)
    net = base()
    net.query = nn.Embedding(4, 4)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"target_modules: 'query' is a Embedding"):
        peft.get_peft_model(net, config())
    model = made()
    broken = config(target_modules=["head"], r=2)
    with torch.no_grad():
        model.base_model.model.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"head.*NaN"):
        model.add_adapter("other", broken)
    with pytest.raises(RuntimeError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize("version", ["0.16.0", "0.22.1", "1.0.0"])
def test_other_versions_of_peft_are_refused(version: str) -> None:
    with pytest.raises(ImportError, match=rf"{version}.*0\.17 to 0\.21"):
        _peft_version.check(version)
    _peft_version.check("0.18.0.dev0")


# ---------------------------------------------------------------------------------- kin in PEFT


def kin(kind: str, dtype: torch.dtype) -> Any:
    if not hasattr(peft, f"{kind}Config"):
        pytest.skip(f"PEFT {peft.__version__} has no {kind}")
    torch.manual_seed(1)
    if kind == "TinyLora":
        settings = peft.TinyLoraConfig(r=4, u=5, target_modules=["query", "dense"])
    else:
        settings = peft.PsoftConfig(r=4, psoft_alpha=6, target_modules=["query", "dense"])
    model = peft.get_peft_model(base(dtype), settings, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["TinyLora", "Psoft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kin_on_our_kernels(kind: str, dtype: torch.dtype) -> None:
    model = kin(kind, dtype)
    exact = copy.deepcopy(model).double()
    ours: Any = accelerate(copy.deepcopy(model))

    def run(m: Any, x: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        trained = [p for p in m.parameters() if p.requires_grad]
        return [y, *torch.autograd.grad(y.square().sum(), [leaf, *trained])]

    x = X.to(dtype)
    for value, peer, truth in zip(run(ours, x), run(model, x), run(exact, x.double()), strict=True):
        close(value, peer, truth)
    with model.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(x), model(x))
    ours.merge_adapter()
    model.merge_adapter()
    torch.testing.assert_close(ours(x), model(x))


def test_kin_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="TinyLoRA or PSOFT"):
        accelerate(base())
    with pytest.raises(TypeError, match="model"):
        accelerate(3)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- Trainer


def bert() -> Any:
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=16, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(settings)


def test_transformers_trainer(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(3)
    data = [
        {"input_ids": ids, "labels": int(ids[0] > 25)}
        for ids in torch.randint(0, 50, (32, 8), generator=g)
    ]
    settings = LoRAXSConfig(
        r=8, lora_alpha=16, task_type="SEQ_CLS",
        target_modules=["query", "value", "attention.output.dense"],
    )  # fmt: skip
    model = peft.get_peft_model(bert(), settings)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "runs"), max_steps=6, per_device_train_batch_size=16,
        learning_rate=2e-2, save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == ("lora_R" in name or "modules_to_save" in name), name
    x = torch.randint(0, 50, (8, 8), generator=g)
    want = model.eval()(x).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(x).logits, want)
    # The first half again, then on from its checkpoint: the same model.
    resumed = transformers.Trainer(
        model=peft.get_peft_model(bert(), settings), args=arguments, train_dataset=data
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-3"))
    torch.testing.assert_close(resumed.model.eval()(x).logits, want)
