"""The official implementation, github.com/MohammadrezaBanaei/LoRA-XS, on this package's kernels.

Its layers are PEFT LoRA layers with one more module in between: ``default_lora_latent_mapping``,
an ``nn.Linear(r, r)`` whose weight is R, made by its ``find_and_initialize`` after a scikit-learn
SVD of every weight. Here :func:`patch` replaces the forward pass of such layers, :func:`initialize`
stands in for ``find_and_initialize``, and :func:`load_cores` and :func:`save_cores` read and write
trained cores in both spellings that PEFT has given them.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loraxs_kernels.initialization import FactorCache, Job, initial_factors
from loraxs_kernels.interop import _layers
from loraxs_kernels.weights import dense_matrix

_SUFFIX = "_lora_latent_mapping"

#: How PEFT names the core in a saved adapter: up to 0.17 without, since 0.18 with the adapter.
SPELLINGS = ("X.default_lora_latent_mapping.weight", "X_lora_latent_mapping.weight")


def is_official_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a PEFT LoRA layer with the official implementation's core."""
    return hasattr(module, "lora_A") and hasattr(module, "lora_B") and bool(_core_modules(module))


def _core_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold R, by adapter."""
    return {
        name.removesuffix(_SUFFIX): child
        for name, child in module.named_children()
        if name.endswith(_SUFFIX)
    }


def official_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that have official cores, by name.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    found = {name: m for name, m in model.named_modules() if is_official_layer(m)}
    if not found:
        raise ValueError(
            "model: has no layer with lora_A, lora_B and default_lora_latent_mapping; "
            "initialize(peft_model, reconstruct_config) makes them"
        )
    return found


# ---------------------------------------------------------------------------------- layers


def _cores(layer: nn.Module) -> dict[str, Tensor]:
    return {name: core.weight for name, core in _core_modules(layer).items()}  # type: ignore[misc]


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _layers.forward(self, _cores(self), x, *args, **kwargs)


def _get_delta_weight(self: Any, adapter: str) -> Tensor:
    return _layers.delta_weight(self, _cores(self)[adapter], adapter)


def _set_adapter(self: Any, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
    """PEFT's, which would train A and B again; here R trains, and of the named adapters only."""
    type(self).set_adapter(self, adapter_names, *args, **kwargs)
    active = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    trains = not kwargs.get("inference_mode", bool(args and args[0]))
    _freeze_bases(self)
    for name, core in _core_modules(self).items():
        core.requires_grad_(trains and name in active)


def _freeze_bases(layer: Any) -> None:
    for modules in (layer.lora_A, layer.lora_B):
        for module in modules.values():
            module.requires_grad_(False)


def patch(model: nn.Module) -> nn.Module:
    """Give every official LoRA-XS layer of ``model`` this package's forward pass, in place.

    ``get_delta_weight`` (and so PEFT's merge) and ``set_adapter`` are replaced too: the bases stay
    frozen whichever adapter is set. What theirs cannot: a bf16 base with an fp32 R, quantized base
    layers, several adapters (``<adapter>_lora_latent_mapping`` each) and batches that mix them.

    Args:
        model: a PEFT model after ``find_and_initialize`` or :func:`initialize`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no official layer.
    """
    for layer in official_layers(model).values():
        _freeze_bases(layer)
        for name, function in (
            ("forward", _forward),
            ("get_delta_weight", _get_delta_weight),
            ("set_adapter", _set_adapter),
        ):
            setattr(layer, name, types.MethodType(function, layer))
    return model


# ---------------------------------------------------------------------------------- initializing


def _checked_config(reconstruct_config: Mapping[str, Any]) -> tuple[int, int]:
    """``(rank, seed)`` of the official YAML; a setting that this cannot follow is refused."""
    if not isinstance(reconstruct_config, Mapping):
        raise TypeError(
            f"reconstruct_config: got {type(reconstruct_config).__name__}, expected a mapping"
        )
    for key, expected in (
        ("reconstruction_type", "svd"),
        ("reconstr_mode", "separated"),
        ("half_init_dec", False),
        ("replacement_module_random_init", False),
        ("r_squared", True),
    ):
        value = reconstruct_config.get(key, expected)
        if value != expected:
            raise ValueError(f"reconstruct_config[{key!r}]: got {value!r}, expected {expected!r}")
    svd = reconstruct_config.get("svd")
    if not isinstance(svd, Mapping) or "rank" not in svd:
        raise ValueError("reconstruct_config['svd']: expected a mapping with 'rank'")
    return svd["rank"], svd.get("random_state", 42)


def initialize(
    peft_model: nn.Module,
    reconstruct_config: Mapping[str, Any],
    *,
    adapter_name: str = "default",
    sign: str | None = "u",
    r_std: float = 1e-5,
    progress: bool = False,
    cache_dir: str | Path | None = None,
) -> nn.Module:
    """Stand-in for the official ``find_and_initialize``: same bases, from this package's SVD.

    ``lora_A`` becomes ``Sigma V^T`` and ``lora_B`` becomes ``U``, both frozen, with a trainable
    ``<adapter>_lora_latent_mapping`` between them, and the layers are patched (:func:`patch`).

    Args:
        peft_model: the model that ``get_peft_model`` made from a ``LoraConfig``.
        reconstruct_config: the official settings (``config/reconstruct_config.yaml``): the rank and
            the seed are taken from its ``svd``; ``n_iter`` has no meaning here, the result is
            certified instead.
        adapter_name: whose layers.
        sign: ``"u"`` for the signs that the official code gets from scikit-learn >= 1.5, ``"v"``
            for those of <= 1.4: cores trained with one do not fit the other.
        r_std: standard deviation of R's start.
        progress: whether to show a progress bar.
        cache_dir: as in :func:`~loraxs_kernels.inject_lora_xs`.

    Returns:
        ``peft_model`` itself.

    Raises:
        TypeError, ValueError: an argument is wrong, a setting is one that the official code has and
            this has not, or the ranks of ``reconstruct_config`` and ``LoraConfig`` differ.
    """
    rank, seed = _checked_config(reconstruct_config)
    if not isinstance(peft_model, nn.Module):
        raise TypeError(f"peft_model: got {type(peft_model).__name__}, expected an nn.Module")
    layers: dict[str, Any] = {
        name: module
        for name, module in peft_model.named_modules()
        if adapter_name in getattr(module, "lora_A", ())
    }
    if not layers:
        raise ValueError(f"adapter_name: the model has no LoRA layer of adapter {adapter_name!r}")
    for name, layer in layers.items():
        if layer.lora_A[adapter_name].weight.shape[0] != rank:
            raise ValueError(
                f"reconstruct_config['svd']['rank']: got {rank}, but {name!r} has rank "
                f"{layer.lora_A[adapter_name].weight.shape[0]}"
            )
    jobs = [
        Job(name, dense_matrix(layer.get_base_layer(), name), rank)
        for name, layer in layers.items()
    ]
    options = {"sigma": "A", "sign": sign, "r_init": "normal", "r_std": r_std, "seed": seed}
    found = initial_factors(jobs, options, progress=progress, cache=FactorCache.at(cache_dir))
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        # One stream over all layers: cores of equal rank must not start equal.
        start = torch.randn(rank, rank, generator=generator) * r_std
        _put_in(layer, adapter_name, found[name].A, start, found[name].B)
    return patch(peft_model)


@torch.no_grad()
def _put_in(layer: Any, adapter: str, A: Tensor, R: Tensor, B: Tensor) -> None:
    for modules, value in ((layer.lora_A, A), (layer.lora_B, B)):
        modules[adapter].weight.copy_(value)
    weight = layer.lora_A[adapter].weight
    core = nn.Linear(len(R), len(R), bias=False, device="meta")
    core.weight = nn.Parameter(R.to(weight.device))
    setattr(layer, adapter + _SUFFIX, core)


# ---------------------------------------------------------------------------------- trained cores


def _state(source: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if path.is_dir():
        found = [path / n for n in ("adapter_model.safetensors", "adapter_model.bin")]
        path = next((file for file in found if file.is_file()), found[0])
    if not path.is_file():
        raise ValueError(f"source: there is no {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def core_names(state: Mapping[str, Tensor], adapter_name: str = "default") -> dict[str, str]:
    """``{layer: key}`` of the cores in a saved adapter, in any of :data:`SPELLINGS`.

    Layers are named as in the base model: without ``base_model.model.``
    """
    # Any word in the adapter's place would take the last part of X for one in the old spelling.
    adapter = f"(?:default|{re.escape(adapter_name)})"
    pattern = re.compile(
        rf"(?:base_model\.model\.)?(.+?)(?:\.{adapter}|)_lora_latent_mapping\.weight"
    )
    return {match[1]: key for key in state if (match := pattern.fullmatch(key)) is not None}


@torch.no_grad()
def load_cores(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
) -> nn.Module:
    """Copy trained cores into the official layers of ``model``.

    Args:
        model: a model after :func:`initialize` or ``find_and_initialize``.
        source: a PEFT adapter folder, one of its files, or a state dict.
        adapter_name: whose cores are overwritten.

    Returns:
        ``model`` itself. After an error it is unchanged.

    Raises:
        ValueError: there are no cores in ``source``, a layer has none, or a shape differs.
    """
    state = _state(source)
    names = core_names(state, adapter_name)
    if not names:
        raise ValueError(f"source: has no key like {' or '.join(SPELLINGS)}")
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in official_layers(model).items()
    }
    if set(names) != set(layers):
        raise ValueError(
            f"source: adapted layers differ; only in the model: "
            f"{sorted(set(layers) - set(names))[:5]}, only in the source: "
            f"{sorted(set(names) - set(layers))[:5]}"
        )
    copies = []
    for name, layer in layers.items():
        target, value = _cores(layer)[adapter_name], state[names[name]]
        if target.shape != value.shape:
            raise ValueError(
                f"source: {names[name]!r} has shape {list(value.shape)}, "
                f"expected {list(target.shape)}"
            )
        copies.append((target, value))
    for target, value in copies:
        target.copy_(value)
    return model


def save_cores(
    model: nn.Module,
    file: str | Path,
    *,
    adapter_name: str = "default",
    spelling: str = SPELLINGS[0],
) -> None:
    """Write the cores (only them) as a safetensors file with the keys of one spelling.

    Raises:
        ValueError: ``spelling`` is not one of :data:`SPELLINGS`, or the model has no cores.
    """
    if spelling not in SPELLINGS:
        raise ValueError(f"spelling: got {spelling!r}, expected one of {SPELLINGS}")
    tensors = {}
    for name, layer in official_layers(model).items():
        key = spelling.replace("X", name, 1).replace("default", adapter_name)
        tensors[key] = _cores(layer)[adapter_name].detach().cpu().contiguous().clone()
    save_file(tensors, file)
