"""Converted cores, written as the files of their new implementation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraxs_kernels import checkpoint
from loraxs_kernels._version import __version__
from loraxs_kernels.factors import LoRAXSFactors, lora_xs_factors
from loraxs_kernels.injection import LoRAXSConfig
from loraxs_kernels.interop._cores import CONFIG, NOTE, TENSORS, Base, Cores, bases
from loraxs_kernels.weights import weight_hash

_PREFIX = "base_model.model."


def write(folder: Path, name: str, cores: Cores, base: Base | None) -> None:
    """Write cores as an adapter of the row ``name``."""
    writer = {"peft": _write_ours, "native": _write_native}.get(name)
    if writer is not None:
        if base is None:
            raise ValueError("base: is needed, as the adapter says which weights it belongs to")
        writer(folder, cores, base)
        return
    row = cores.row
    R = cores.R
    tensors = {row.key_of(layer): core.float() for layer, core in R.items()}
    config: dict[str, Any] | None = None
    if row.stored == "core plus identity":
        eye = {layer: torch.eye(len(core)) for layer, core in R.items()}
        tensors = {row.key_of(layer): (core + eye[layer]).float() for layer, core in R.items()}
        config = _psoft_config(cores, base)
    elif row.stored == "folded":
        config = _lora_config(cores, base)
        tensors = {}
        for layer, core in R.items():
            A, B = bases(row, layer, base, len(core))
            tensors[f"{_PREFIX}{layer}.lora_A.weight"] = (core @ A).float()
            tensors[f"{_PREFIX}{layer}.lora_B.weight"] = B.float()
    _put(folder, tensors, row.prefix, cores.extra, config)
    note = {
        "format": "loraxs_kernels.convert",
        "library": __version__,
        "convention": name,
        "sigma": row.sigma,
        "sign": row.sign,
        "scale": row.scale,
        "alpha": _usual(cores.alpha),
        "alpha_pattern": _unusual(cores.alpha),
        "modules": {layer: {"rank": len(core)} for layer, core in R.items()},
    }
    (folder / NOTE).write_text(json.dumps(note, indent=1))


def _put(
    folder: Path,
    tensors: dict[str, Tensor],
    prefix: str,
    extra: dict[str, Tensor],
    config: dict[str, Any] | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    both = {**{prefix + name: value for name, value in extra.items()}, **tensors}
    save_file({k: v.contiguous().clone() for k, v in both.items()}, folder / TENSORS)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


# ---------------------------------------------------------------------------------- PEFT folders


def _usual(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _unusual(values: dict[str, Any]) -> dict[str, Any]:
    """What differs from the usual, by layer, as PEFT's patterns."""
    usual = _usual(values)
    return {layer: value for layer, value in values.items() if value != usual}


def _targets(layers: list[str], base: Base | None) -> list[str]:
    """Last names if they mean just these layers (what most loaders expect), else full names."""
    last = sorted({layer.rpartition(".")[2] for layer in layers})
    if base is None:
        return sorted(layers)
    meant = [name for name in base.names() if name.rpartition(".")[2] in last]
    return last if len(meant) == len(layers) else sorted(layers)


def _modules(extra: dict[str, Tensor]) -> list[str]:
    """The modules whose tensors these are."""
    return sorted({key.rpartition(".")[0] for key in extra})


def _shared(cores: Cores, base: Base | None) -> dict[str, Any]:
    """Settings that every PEFT configuration has."""
    ranks = {layer: len(core) for layer, core in cores.R.items()}
    keep = ("task_type", "base_model_name_or_path", "modules_to_save", "bias", "revision")
    kept = {name: cores.config[name] for name in keep if cores.config.get(name) is not None}
    if cores.extra:
        kept.setdefault("modules_to_save", _modules(cores.extra))
    return {
        **kept,
        "r": _usual(ranks),
        "rank_pattern": _unusual(ranks),
        "target_modules": _targets(list(ranks), base),
        "inference_mode": True,
    }


def _lora_config(cores: Cores, base: Base | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        **_shared(cores, base),
        "lora_alpha": _usual(cores.alpha),
        "alpha_pattern": _unusual(cores.alpha),
        "fan_in_fan_out": bool(cores.config.get("fan_in_fan_out", False)),
    }


def _psoft_config(cores: Cores, base: Base | None) -> dict[str, Any]:
    settings = _shared(cores, base)
    if settings.pop("rank_pattern"):
        raise ValueError("to: PEFT PSOFT has one rank for all layers")
    return {
        "peft_type": "PSOFT",
        **settings,
        "psoft_alpha": settings["r"],
        "psoft_orth": False,
        "psoft_mag_a": False,
        "psoft_mag_b": False,
        "ab_svd_init": "psoft_init",
        "psoft_svd": "full",
    }


def write_lora(
    folder: Path, factors: dict[str, tuple[Tensor, Tensor]], cores: Cores, base: Base | None
) -> None:
    """Write ``lora_A`` and ``lora_B`` (with the scale in it) as a PEFT LoRA."""
    tensors = {}
    for layer, (A, B) in factors.items():
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = A
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = B
    ranks = {layer: float(len(core)) for layer, core in cores.R.items()}
    folded = Cores(cores.row, cores.R, {}, ranks, {}, cores.extra, cores.config)
    config = _lora_config(folded, base)
    _put(folder, tensors, _PREFIX, cores.extra, config)


# ---------------------------------------------------------------------------------- ours


def _found(cores: Cores, base: Base, layer: str) -> LoRAXSFactors:
    row, weight = cores.row, base.matrix(layer)
    return lora_xs_factors(
        weight, len(cores.R[layer]), sigma=row.sigma, sign=row.sign, r_init="zeros"
    )


def _write_ours(folder: Path, cores: Cores, base: Base) -> None:
    from loraxs_kernels.interop.peft import LoRAXSConfig as PeftConfig

    tensors = {}
    row = cores.row
    for layer, core in cores.R.items():
        found = _found(cores, base, layer)
        about = {
            "format": 1,
            "rank": len(core),
            "scaling": cores.scaling[layer],
            "sigma": row.sigma,
            "sign": row.sign,
            "subspace": "top",
            "weight_sha256": base.stored_hash(layer),
            **checkpoint.fingerprint(found.A, found.S),
        }
        text = bytearray(json.dumps(about, sort_keys=True).encode())
        tensors[f"{_PREFIX}{layer}.lora_R"] = core.float()
        tensors[f"{_PREFIX}{layer}.lora_about"] = torch.frombuffer(text, dtype=torch.uint8)
    settings = _shared(cores, base)
    config = PeftConfig(
        **settings, lora_alpha=_usual(cores.alpha), alpha_pattern=_unusual(cores.alpha),
        sigma=row.sigma, sign=row.sign,
    )  # fmt: skip
    _put(folder, tensors, _PREFIX, cores.extra, None)
    config.save_pretrained(str(folder))


def _write_native(folder: Path, cores: Cores, base: Base) -> None:
    ranks = {layer: len(core) for layer, core in cores.R.items()}
    ratios = {layer: cores.alpha[layer] for layer in ranks}
    if len(set(ratios.values())) > 1:
        raise ValueError("to: save_adapter has one alpha for all layers; the source has several")
    config = LoRAXSConfig(
        _usual(ranks), target_modules=sorted(ranks), alpha=_usual(ratios),
        rank_pattern=_unusual(ranks) or None, sigma=cores.row.sigma, sign=cores.row.sign,
        modules_to_save=_modules(cores.extra) or None,
    )  # fmt: skip
    modules = {}
    for layer, core in cores.R.items():
        found = _found(cores, base, layer)
        modules[layer] = {
            "rank": len(core),
            "scaling": cores.scaling[layer],
            "num_adapters": None,
            "weight_sha256": weight_hash(base.matrix(layer)),
            **checkpoint.fingerprint(found.A, found.S),
        }
    tensors = {f"{layer}.R": core.float() for layer, core in cores.R.items()}
    metadata = checkpoint.metadata_of(config, modules, _modules(cores.extra), False)
    checkpoint.write_files(folder, {**cores.extra, **tensors}, metadata)
