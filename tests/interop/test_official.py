"""The official implementation's layers on ours: outputs, gradients, merging, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraxs_kernels.interop import official
from tests.interop.official_code import CONFIG, find_and_initialize

peft = pytest.importorskip("peft")


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


def config(**changes: Any) -> Any:
    values: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"]}
    return peft.LoraConfig(**{**values, **changes})


def theirs(dtype: torch.dtype = torch.float32) -> Any:
    """Their model with cores far from their start."""
    model = peft.get_peft_model(base(dtype), config())
    find_and_initialize(model)
    torch.manual_seed(1)
    for core in cores(model):
        nn.init.normal_(core, std=0.2)
    return model


X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))


def cores(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    return [p for n, p in model.named_parameters() if f"{adapter}_lora_latent" in n]


def test_patched_outputs_and_gradients_are_theirs() -> None:
    model = theirs()
    ours: Any = official.patch(copy.deepcopy(model))
    for m in (model, ours):
        m(X).square().sum().backward()
    torch.testing.assert_close(ours(X), model(X), rtol=1e-5, atol=1e-5)
    for a, b in zip(cores(ours), cores(model), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_sixteen_bit_base_with_a_float32_core() -> None:
    model: Any = official.patch(theirs(torch.bfloat16))
    for core in cores(model):
        core.data = core.data.float()
    y = model(X.bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(core.grad is not None and core.grad.dtype == torch.float32 for core in cores(model))
    torch.testing.assert_close(y.float(), theirs()(X), rtol=0.1, atol=0.1)


def test_training_only_the_core() -> None:
    model: Any = official.initialize(peft.get_peft_model(base(), config()), CONFIG)
    model.set_adapter("default")
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 and all(n.endswith("default_lora_latent_mapping.weight") for n in names)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base()(X))


def test_initialize_has_their_bases_and_their_cores_fit() -> None:
    model = theirs()
    ours: Any = official.initialize(peft.get_peft_model(base(), config()), CONFIG)
    for a, b in zip(
        official.official_layers(ours).values(),
        official.official_layers(model).values(),
        strict=True,
    ):
        # scikit-learn's vectors have an error of their own.
        for side in ("lora_A", "lora_B"):
            got, want = (getattr(m, side)["default"].weight for m in (a, b))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
    state = {n: p for n, p in model.state_dict().items() if "latent" in n}
    official.load_cores(ours, state)
    torch.testing.assert_close(ours(X), model(X), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spelling", official.SPELLINGS)
def test_cores_in_both_spellings(tmp_path: Path, spelling: str) -> None:
    model = theirs()
    official.save_cores(model, tmp_path / "adapter_model.safetensors", spelling=spelling)
    ours: Any = official.initialize(peft.get_peft_model(base(), config()), CONFIG)
    official.load_cores(ours, tmp_path)
    for a, b in zip(cores(ours), cores(model), strict=True):
        assert torch.equal(a, b)


def test_cores_of_nested_layers_in_both_spellings() -> None:
    layer = "encoder.layer.0.attention.self.query"
    for key in (f"{layer}.default", layer, f"{layer}.other"):
        state = {f"base_model.model.{key}_lora_latent_mapping.weight": torch.zeros(2, 2)}
        assert list(official.core_names(state, "other")) == [layer]


def test_an_adapter_saved_by_peft(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    ours: Any = official.initialize(peft.get_peft_model(base(), config()), CONFIG)
    official.load_cores(ours, tmp_path)
    for a, b in zip(cores(ours), cores(model), strict=True):
        assert torch.equal(a, b)


def test_merging() -> None:
    model: Any = official.patch(theirs())
    want = model(X)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(X), want, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_two_adapters_and_mixed_batches(shared: bool) -> None:
    model = peft.get_peft_model(base(), config())
    model.add_adapter("other", config())
    for seed, name in enumerate(("default", "other")):
        random_state = 42 if shared else 42 + seed
        settings = {**CONFIG, "svd": {**CONFIG["svd"], "random_state": random_state}}
        official.initialize(
            model, settings, adapter_name=name, r_std=0.3, sign="u" if shared or not seed else "v"
        )
    for core in cores(model, "other"):
        nn.init.normal_(core, std=0.3)
    single = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        single[name] = model(X)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 2 and all(f"{name}_lora_latent" in n for n in trained)
    assert not torch.allclose(single["default"], single["other"])
    model.eval()
    batch = torch.cat([X, X])
    names = ["default", "other", "__base__", "other"]
    y = model(batch, adapter_names=names)
    with model.disable_adapter():
        plain = model(batch)
    for i, name in enumerate(names):
        want = plain[i] if name == "__base__" else single[name][i % 2]
        torch.testing.assert_close(y[i], want, rtol=1e-5, atol=1e-5)


def test_wrong_use_is_named() -> None:
    with pytest.raises(ValueError, match=r"^model:"):
        official.patch(base())
    with pytest.raises(TypeError, match=r"^model:"):
        official.patch(3)  # type: ignore[arg-type]
    model = peft.get_peft_model(base(), config())
    for changes, message in (
        ({"r_squared": False}, "r_squared"),
        ({"half_init_dec": True}, "half_init_dec"),
        ({"svd": {"rank": 5}}, "rank"),
        ({"svd": None}, "svd"),
    ):
        with pytest.raises(ValueError, match=message):
            official.initialize(model, {**CONFIG, **changes})
    with pytest.raises(ValueError, match="adapter_name"):
        official.initialize(model, CONFIG, adapter_name="none")
    ours = official.initialize(model, CONFIG)
    with pytest.raises(ValueError, match="source"):
        official.load_cores(ours, {})
    state = {
        f"base_model.model.{n}.default_lora_latent_mapping.weight": torch.zeros(5, 5)
        for n in ("query", "dense")
    }
    with pytest.raises(ValueError, match="shape"):
        official.load_cores(ours, state)
