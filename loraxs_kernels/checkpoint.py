"""Adapter files: a directory with ``adapter.safetensors`` (R) and ``adapter.json`` (all the rest).

The bases A and B are not stored unless asked for: they follow from the base weight. What is stored
of them is a fingerprint, the singular values and ``A @ Omega`` for a seeded Gaussian ``Omega``.
Singular vectors are unique only up to sign (and up to a rotation among equal singular values), and
LAPACK does not even give the same bits with another number of threads; so on loading a sign or
rotation is found from the fingerprints and R is carried over, ``R' = T^T R T`` for ``A_saved = T
A_here``.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loraxs_kernels import injection
from loraxs_kernels.injection import LoRAXSConfig
from loraxs_kernels.nn import LoRAXSLinear
from loraxs_kernels.weights import weight_hash

FORMAT_VERSION = 1
TENSORS, METADATA = "adapter.safetensors", "adapter.json"
#: Whose versions are written down, to help find out later why two runs differ.
_LIBRARIES = ("loraxs_kernels", "torch", "safetensors")

_PROBES = 4
#: Singular values closer than this (relative) may be rotated into each other.
_CLUSTER = 1e-3
#: How far the bases found here may be from the saved ones, relative to a row's length.
_TOLERANCE = 1e-3


# ---------------------------------------------------------------------------------- fingerprints


def _probe(A: Tensor) -> Tensor:
    """``A @ Omega``, ``[r, 4]`` in float64."""
    generator = torch.Generator().manual_seed(A.shape[1])
    omega = torch.randn(A.shape[1], _PROBES, generator=generator, dtype=torch.float64)
    return A.detach().double().cpu() @ omega


def _encode(t: Tensor) -> str:
    return base64.b64encode(t.float().contiguous().numpy().tobytes()).decode("ascii")


def _decode(about: dict[str, Any], key: str, *shape: int) -> Tensor:
    try:
        raw = bytearray(base64.b64decode(about[key], validate=True))
        return torch.frombuffer(raw, dtype=torch.float32).reshape(shape).double()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"directory: {METADATA} has no valid {key!r}: {error}") from error


def fingerprint(A: Tensor, S: Tensor) -> dict[str, str]:
    """What is stored of bases that are not: their singular values and the probe of A."""
    return {"singular_values": _encode(S.detach().cpu()), "probe": _encode(_probe(A))}


def basis_change_to(saved: dict[str, Any], A: Tensor, S: Tensor) -> Tensor | None:
    """:func:`basis_change` from a :func:`fingerprint`; ``None`` also if the values differ."""
    values = _decode(saved, "singular_values", len(S))
    if not bool(((values - S.cpu()).abs() <= _TOLERANCE * values.abs().max()).all()):
        return None
    return basis_change(_decode(saved, "probe", len(S), _PROBES), _probe(A), values)


def _base_weight(layer: LoRAXSLinear) -> Tensor:
    return layer.weight if layer.unmerged_weight is None else layer.unmerged_weight


def _is_sharded(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor: FSDP or tensor parallelism has left a part of it here."""
    return hasattr(t, "full_tensor")


def _whole(t: Tensor) -> Tensor:
    """The whole of ``t``; for a DTensor a collective call."""
    whole: Tensor = t.full_tensor() if _is_sharded(t) else t  # type: ignore[attr-defined]
    return whole.detach()


def _describe(layer: LoRAXSLinear) -> dict[str, Any]:
    return {
        "rank": layer.rank,
        "scaling": layer.scaling,
        "num_adapters": layer.num_adapters,
        "weight_sha256": weight_hash(_whole(_base_weight(layer))),
        **fingerprint(_whole(layer.A), layer.S),
    }


def _clusters(S: Tensor) -> list[slice]:
    """Runs of (nearly) equal singular values."""
    values, runs, start = S.tolist(), [], 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i - 1] - values[i] > _CLUSTER * max(values[0], 1e-300):
            runs.append(slice(start, i))
            start = i
    return runs


def basis_change(saved_probe: Tensor, probe: Tensor, S: Tensor) -> Tensor | None:
    """The orthogonal T with ``A_saved = T A_here``, or ``None`` if there is none.

    T is diagonal (signs) but for blocks of equal singular values. There it is the nearest rotation
    in the least-squares sense (orthogonal Procrustes, Schoenemann 1966), found from the probes,
    and so only for blocks of at most four.
    """
    T = torch.zeros(len(S), len(S), dtype=torch.float64)
    for run in _clusters(S):
        here, there = probe[run], saved_probe[run]
        signs = torch.where((here * there).sum(1) < 0, -1.0, 1.0).double()
        block = torch.diag(signs)
        if not _close(block @ here, there) and 1 < len(here) <= _PROBES:
            u, _, vh = torch.linalg.svd(there @ here.mT)
            block = u @ vh
        if not _close(block @ here, there):
            return None
        T[run, run] = block
    return T


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).norm(dim=1) <= _TOLERANCE * b.norm(dim=1).clamp_min(1e-30)).all())


# ---------------------------------------------------------------------------------- saving

#: Each file knows the other's digest: the JSON that of the whole file of tensors, the header of the
#: latter that of the JSON without it.
_DIGEST = "metadata_sha256"


def _digest(metadata: dict[str, Any]) -> str:
    described = {k: v for k, v in metadata.items() if k != "tensors_sha256"}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _directory(directory: str | Path) -> Path:
    if not isinstance(directory, (str, Path)):
        raise TypeError(f"directory: got {type(directory).__name__}, expected a path")
    if Path(directory).exists() and not Path(directory).is_dir():
        raise ValueError(f"directory: {directory} is a file")
    return Path(directory)


def save_adapter(model: nn.Module, directory: str | Path, *, embed_bases: bool = False) -> None:
    """Write the adapter of an injected model: R of each layer, the modules to save, and metadata.

    Of a model sharded by FSDP2 or tensor parallelism, the parts are brought together layer by
    layer: every rank must make the call, and rank 0 writes the files.

    Args:
        model: a model that :func:`~loraxs_kernels.inject_lora_xs` has changed.
        directory: is made if it does not exist; the two files in it are replaced.
        embed_bases: store A and B too: larger, but loading needs no SVD and no fingerprint.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the model has no adapter, or ``directory`` is a file.
    """
    target = _directory(directory)
    if not isinstance(embed_bases, bool):
        raise TypeError(f"embed_bases: got {type(embed_bases).__name__}, expected a bool")
    config, saved = injection.injection_state(model)
    layers = injection.lora_xs_layers(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.R"] = _whole(layer.R)
        if embed_bases:
            tensors[f"{name}.A"], tensors[f"{name}.B"] = _whole(layer.A), _whole(layer.B)
    for name in saved:
        for key, value in model.get_submodule(name).state_dict().items():
            tensors[f"{name}.{key}"] = _whole(value)
    metadata = metadata_of(
        config, {name: _describe(layer) for name, layer in layers.items()}, saved, embed_bases
    )
    if any(map(_is_sharded, model.parameters())) and torch.distributed.get_rank() != 0:
        return
    write_files(target, tensors, metadata)


def metadata_of(
    config: LoRAXSConfig, modules: dict[str, Any], saved: list[str], embed_bases: bool
) -> dict[str, Any]:
    """What ``adapter.json`` holds."""
    return {
        "format": "loraxs_kernels",
        "version": FORMAT_VERSION,
        "library": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "config": config.to_dict(),
        "saved": saved,
        "embed_bases": embed_bases,
        "svd": "loraxs_kernels.randomized_svd",
        "modules": modules,
    }


def write_files(
    directory: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write the two files of an adapter, each with the other's digest."""
    target = _directory(directory)
    target.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that an interrupted save leaves no half file under the name.
    part = target / (TENSORS + ".part")
    values = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    save_file(values, part, {_DIGEST: _digest(metadata)})
    metadata["tensors_sha256"] = hashlib.sha256(part.read_bytes()).hexdigest()
    part.replace(target / TENSORS)
    text = target / (METADATA + ".part")
    text.write_text(json.dumps(metadata, indent=1))
    text.replace(target / METADATA)


# ---------------------------------------------------------------------------------- loading


def read_files(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(metadata, tensors)`` of an adapter's files, checked for themselves."""
    source = _directory(directory)
    for file in (METADATA, TENSORS):
        if not (source / file).is_file():
            raise ValueError(f"directory: {source} has no {file}")
    try:
        metadata = json.loads((source / METADATA).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"directory: {METADATA} is not JSON: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != "loraxs_kernels":
        raise ValueError(f"directory: {METADATA} was not written by loraxs_kernels")
    if metadata.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"directory: {METADATA} has version {metadata.get('version')!r}, "
            f"expected {FORMAT_VERSION}"
        )
    missing = {"config", "saved", "embed_bases", "modules", "tensors_sha256"} - set(metadata)
    if missing:
        raise ValueError(f"directory: {METADATA} lacks {sorted(missing)}")
    _check_about(metadata["modules"])
    if hashlib.sha256((source / TENSORS).read_bytes()).hexdigest() != metadata["tensors_sha256"]:
        raise ValueError(f"directory: {TENSORS} is truncated or was changed (SHA-256 differs)")
    try:
        tensors = load_file(source / TENSORS)
        with safetensors.safe_open(source / TENSORS, "pt") as file:
            header = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"directory: {TENSORS} cannot be read: {error}") from error
    if header.get(_DIGEST) != _digest(metadata):
        raise ValueError(f"directory: {METADATA} was changed (SHA-256 differs)")
    return metadata, tensors


#: What is known of each adapted layer, and its type in the JSON.
_ABOUT: dict[str, tuple[type, ...]] = {
    "rank": (int,),
    "scaling": (float, int),
    "num_adapters": (int, type(None)),
    "weight_sha256": (str,),
    "singular_values": (str,),
    "probe": (str,),
}


def _check_about(modules: Any) -> None:
    """Raise ``ValueError`` unless every layer is described in full."""
    if not isinstance(modules, dict):
        raise ValueError(f"directory: {METADATA} has no table of modules")
    for name, about in modules.items():
        for key, types in _ABOUT.items():
            value = about.get(key, _ABOUT) if isinstance(about, dict) else about
            if isinstance(value, bool) or not isinstance(value, types):
                raise ValueError(f"directory: {METADATA} has no valid {key!r} for {name!r}")


def _expect_tensor(tensors: dict[str, Tensor], key: str, like: Tensor) -> Tensor:
    value = tensors.get(key)
    if value is None:
        raise ValueError(f"directory: {TENSORS} lacks {key!r}")
    if value.shape != like.shape:
        raise ValueError(
            f"directory: {key!r} has shape {list(value.shape)}, expected {list(like.shape)}"
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"directory: {key!r} contains NaN or infinity")
    return value


def _embedded(
    metadata: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, injection.Bases] | None:
    if not isinstance(metadata["embed_bases"], bool):
        raise ValueError(f"directory: {METADATA} has no valid 'embed_bases'")
    if not metadata["embed_bases"]:
        return None
    bases = {}
    for name, about in metadata["modules"].items():
        if f"{name}.A" not in tensors or f"{name}.B" not in tensors:
            raise ValueError(f"directory: {TENSORS} lacks the bases of {name!r}")
        S = _decode(about, "singular_values", about["rank"]).float()
        bases[name] = (tensors[f"{name}.A"], tensors[f"{name}.B"], S)
    return bases


def _check_layer(name: str, layer: LoRAXSLinear, about: dict[str, Any]) -> None:
    for key in ("rank", "scaling", "num_adapters"):
        if getattr(layer, key) != about[key]:
            raise ValueError(
                f"model: {name!r} has {key} {getattr(layer, key)}, the adapter {about[key]}"
            )
    if weight_hash(_base_weight(layer)) != about["weight_sha256"]:
        raise ValueError(
            f"model: the base weight of {name!r} is not the one that the adapter was trained on"
        )


def _core_here(name: str, layer: LoRAXSLinear, about: dict[str, Any], R: Tensor) -> Tensor:
    """The saved core, carried over to the bases of this model's layer."""
    saved = _decode(about, "probe", about["rank"], _PROBES)
    change = basis_change(saved, _probe(layer.A), _decode(about, "singular_values", about["rank"]))
    if change is None:
        raise ValueError(
            f"model: the bases of {name!r} found here differ from those of the adapter by "
            "more than signs and rotations of equal singular values; save it with embed_bases=True"
        )
    return (change.mT @ R.double() @ change).to(R.dtype)


_LAYOUT = ("sigma", "sign", "subspace")


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load an adapter into its base model, injecting the layers if the model has none.

    Everything is checked first; after an error the model is unchanged.

    Args:
        model: the base model, or one injected with an equal configuration.
        directory: what :func:`save_adapter` has written.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a file is missing, truncated or changed; the base weights, ranks, scaling,
            number of adapters or Sigma side differ; the bases found here are not those of the
            adapter; a layer of the model is merged.
    """
    layers = injection.lora_xs_layers(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"model: {merged[0]!r} is merged; unmerge() it first")
    metadata, tensors = read_files(directory)
    try:
        config = LoRAXSConfig.from_dict(metadata["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"directory: {METADATA} has an invalid config: {error}") from error
    injected_here = not layers
    if injected_here:
        layers, saved = injection.plan(model, config, _embedded(metadata, tensors))
    else:
        here, saved = injection.injection_state(model)
        for key in _LAYOUT:
            if getattr(here, key) != getattr(config, key):
                raise ValueError(
                    f"model: was injected with {key}={getattr(here, key)!r}, the adapter has "
                    f"{getattr(config, key)!r}"
                )
    try:
        new = _checked_values(model, metadata, tensors, layers, saved)
    except BaseException:
        if injected_here:
            injection.discard(layers)
        raise
    if injected_here:
        injection.commit(model, config, layers, saved)
    with torch.no_grad():
        for target, value in new:
            target.copy_(value)
    return model


def _checked_values(
    model: nn.Module,
    metadata: dict[str, Any],
    tensors: dict[str, Tensor],
    layers: dict[str, LoRAXSLinear],
    saved: list[str],
) -> list[tuple[Tensor, Tensor]]:
    """What to copy where, after every check."""
    modules = metadata["modules"]
    if set(modules) != set(layers):
        ours, theirs = set(layers) - set(modules), set(modules) - set(layers)
        raise ValueError(
            f"model: adapted layers differ; only in the model: {sorted(ours)}, "
            f"only in the adapter: {sorted(theirs)}"
        )
    if saved != metadata["saved"]:
        raise ValueError(f"model: modules_to_save are {saved}, the adapter has {metadata['saved']}")
    new: list[tuple[Tensor, Tensor]] = []
    for name, layer in layers.items():
        about = modules[name]
        _check_layer(name, layer, about)
        R = _expect_tensor(tensors, f"{name}.R", layer.R)
        if metadata["embed_bases"]:
            A = _expect_tensor(tensors, f"{name}.A", layer.A)
            B = _expect_tensor(tensors, f"{name}.B", layer.B)
            new += [(layer.A, A), (layer.B, B), (layer.R, R)]
        else:
            new.append((layer.R, _core_here(name, layer, about, R)))
    for name in saved:
        for key, value in model.get_submodule(name).state_dict(keep_vars=True).items():
            new.append((value, _expect_tensor(tensors, f"{name}.{key}", value)))
    return new
