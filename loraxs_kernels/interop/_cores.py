"""Trained cores on their way from one implementation to another: read from its files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from loraxs_kernels import checkpoint
from loraxs_kernels.factors import lora_xs_factors
from loraxs_kernels.interop.conventions import CONVENTIONS, POWERS, SCALES, Convention
from loraxs_kernels.svd import apply_sign_rule
from loraxs_kernels.weights import dense_matrix, weight_hash

#: Written beside converted cores: what they are.
NOTE = "conversion.json"
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
#: How A and B are called in files that hold them.
_BASES = ((".lora_A.weight", ".lora_B.weight"), (".tinylora_A", ".tinylora_B"), (".Vh", ".U"),
          (".A", ".B"))  # fmt: skip


@dataclass
class Cores:
    """What an adapter holds, in float64 where it is computed with.

    Args:
        row: the conventions, as this adapter has them.
        R: the cores, ``y += s B R A x``, by layer.
        scaling: s by layer.
        alpha: by layer, where the scale has one.
        bases: A and B, where they were saved.
        extra: other trained tensors by their name in the base model.
        config: the settings saved with it.
    """

    row: Convention
    R: dict[str, Tensor]
    scaling: dict[str, float]
    alpha: dict[str, float]
    bases: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


class Base:
    """The base model's weights: a module, a mapping of tensors, or safetensors files.

    Args:
        source: the model, its state dict, a ``.safetensors`` file or a folder of them.
        transposed: whether matrices are stored ``[in, out]`` (Conv1D); a module knows.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor] | str | Path, transposed: bool):
        self._model = source if isinstance(source, nn.Module) else None
        self._transposed = transposed
        self._tensors = source if isinstance(source, Mapping) else {}
        self._files: dict[str, Path] = {}
        self._factors: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}
        if isinstance(source, (str, Path)):
            path = Path(source)
            for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
                with safe_open(file, "pt") as opened:
                    self._files.update(dict.fromkeys(opened.keys(), file))
            if not self._files:
                raise ValueError(f"base: there are no safetensors files in {path}")

    def names(self) -> list[str]:
        """All layers that have a weight."""
        names: Any = {**self._tensors, **self._files}
        if self._model is not None:
            names = self._model.state_dict()
        return [key.removesuffix(".weight") for key in names if key.endswith(".weight")]

    def matrix(self, layer: str) -> Tensor:
        """The weight ``[out, in]`` of a layer.

        Raises:
            ValueError: there is none, or more than one that may be meant.
        """
        if self._model is not None:
            return dense_matrix(self._module(layer), layer).detach()
        weight = self._stored(layer)
        return weight.t() if self._transposed else weight

    def stored_hash(self, layer: str) -> str:
        """The hash of the weight in the layout it is stored in."""
        if self._model is not None:
            weight: Any = self._module(layer).weight
            return weight_hash(weight)
        return weight_hash(self._stored(layer))

    def _module(self, layer: str) -> nn.Module:
        assert self._model is not None
        try:
            return self._model.get_submodule(layer)
        except AttributeError:
            raise ValueError(f"base: the model has no layer {layer!r}") from None

    def _stored(self, layer: str) -> Tensor:
        names = [n for n in self.names() if n == layer] or [
            n for n in self.names() if f".{n}".endswith(f".{layer}") or layer.endswith(f".{n}")
        ]
        if len(names) != 1:
            raise ValueError(f"base: expected one weight of layer {layer!r}, found {names[:4]}")
        key = names[0] + ".weight"
        if key in self._tensors:
            return self._tensors[key]
        with safe_open(self._files[key], "pt") as opened:
            weight: Tensor = opened.get_tensor(key)
        return weight

    def svd(self, layer: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """``U [out, r]``, ``S [r]``, ``Vh [r, in]`` in float64, signed by the rule "u"."""
        key = (layer, rank)
        if key not in self._factors:
            weight = self.matrix(layer)
            wide = torch.promote_types(weight.dtype, torch.float32)
            found = lora_xs_factors(weight.to(wide), rank, sigma="none", r_init="zeros")
            self._factors[key] = (found.B.double(), found.S.double(), found.A.double())
        return self._factors[key]


def signs(
    row: Convention,
    layer: str,
    base: Base,
    rank: int,
    saved: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The signs ``[r]`` of a row's singular pairs (or of saved A and B) against ``base.svd``."""
    U, _, Vh = base.svd(layer, rank)
    if saved is not None:
        A, B = saved
        along = torch.stack(
            [torch.cosine_similarity(A, Vh, dim=1), torch.cosine_similarity(B.mT, U.mT, dim=1)]
        )
        if bool((along.abs() < 1 - 1e-3).any()) or bool((along[0] * along[1] < 0).any()):
            raise ValueError(
                f"base: the bases saved for {layer!r} are not the singular vectors of its weight"
            )
        return along[0].sign()
    if row.sign is None:
        theirs = torch.linalg.svd(base.matrix(layer).float(), full_matrices=False).Vh[:rank]
        return (theirs.double() * Vh).sum(1).sign()
    turned, _ = apply_sign_rule(U.mT, Vh, row.sign)
    return (turned * U.mT).sum(1).sign()


def bases(row: Convention, layer: str, base: Base | None, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a row, in float64, from the base weight."""
    if base is None:
        raise ValueError("base: is needed, as the source holds no A and B")
    U, S, Vh = base.svd(layer, rank)
    a, b = POWERS[row.sigma]
    D = signs(row, layer, base, rank)
    return (D * S.pow(a))[:, None] * Vh, U * (D * S.pow(b))


# ---------------------------------------------------------------------------------- reading


def state_of(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings of an adapter: a folder, or a file of tensors.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        names = (TENSORS, "adapter_model.bin", "model.safetensors", checkpoint.TENSORS)
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError(f"source: {path} has none of {', '.join(names)}")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"source: there is no {path}")
    if path.suffix == ".safetensors":
        tensors = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    config: dict[str, Any] = {}
    for name in (NOTE, CONFIG):
        if (folder / name).is_file():
            config = {**config, **json.loads((folder / name).read_text())}
    return tensors, config


def read(
    source: str | Path,
    row: Convention,
    *,
    base: Base | None,
    alpha: float | None,
    sign: str | None,
    route: str | None,
) -> Cores:
    """The cores of an adapter.

    Args:
        source: a folder, or a file of tensors.
        row: whose conventions it follows.
        base: the base weights, where R must be computed from them.
        alpha: overrides the one found in ``adapter_config.json``.
        sign: overrides the row's sign rule.
        route: which core, where a layer has several.

    Raises:
        ValueError: there are no cores of that kind, or something needed is missing.
    """
    if row is CONVENTIONS["native"]:
        return _read_native(source, row)
    tensors, config = state_of(source)
    found: dict[str, str] = {}
    routes: set[str] = set()
    for key in tensors:
        match = row.module_of(key)
        if match is None or (route is not None and match[1] not in ("", route)):
            continue
        routes.add(match[1])
        found[match[0]] = key
    if not found:
        raise ValueError(f"source: has no key like {' or '.join(row.keys)}")
    if len(routes) > 1:
        raise ValueError(f"route: layers have several cores, name one of {sorted(routes)}")
    bases = _bases(tensors, list(found)) if row.stored != "folded" else {}
    row, R = _acting(row, tensors, found, config, base)
    cores = Cores(dataclasses.replace(row, sign=sign or row.sign), R, {}, {}, bases)
    cores.config = config
    for layer, core in R.items():
        cores.alpha[layer], cores.scaling[layer] = _scaling(cores.row, layer, core, config, alpha)
    used = set(found.values())
    for key, value in tensors.items():
        name = key.removeprefix(_PREFIX)
        inside = any(name.startswith(f"{layer}.") for layer in found)
        if key not in used and not inside and "tinylora_v" not in key:
            cores.extra[name] = value
    return cores


def _scaling(
    row: Convention, layer: str, core: Tensor, config: dict[str, Any], alpha: float | None
) -> tuple[float, float]:
    rank = core.shape[0]
    if row.scale == "1":
        return float(rank), 1.0
    if alpha is None:
        alpha = config.get("lora_alpha", config.get("alpha"))
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                alpha = value
                break
    if alpha is None:
        raise ValueError(
            f"alpha: got None and there is no {CONFIG} with lora_alpha; the scale of {row.library} "
            f"is {row.scale}"
        )
    scale = "alpha/sqrt(r)" if config.get("use_rslora") else row.scale
    return float(alpha), SCALES[scale](float(alpha), rank)


def _bases(tensors: Mapping[str, Tensor], layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for layer in layers:
        for prefix in ("", _PREFIX):
            for a, b in _BASES:
                if prefix + layer + a in tensors and prefix + layer + b in tensors:
                    A, B = tensors[prefix + layer + a], tensors[prefix + layer + b]
                    found[layer] = (A.double(), B.double())
    return found


def _acting(
    row: Convention,
    tensors: Mapping[str, Tensor],
    found: dict[str, str],
    config: dict[str, Any],
    base: Base | None,
) -> tuple[Convention, dict[str, Tensor]]:
    """The cores that act between A and B, from what is stored of them."""
    if row is CONVENTIONS["peft"]:
        return _read_ours(row, tensors, found)
    if row.stored == "core":
        return row, {layer: tensors[key].double() for layer, key in found.items()}
    if row.stored == "span":
        return row, _spans(tensors, found, config)
    if row.stored == "core plus identity":
        if config.get("ab_svd_init") == "pissa_init":
            row = dataclasses.replace(row, sigma="both")
        return row, {layer: _psoft(tensors, key, config) for layer, key in found.items()}
    return row, {layer: _unfolded(row, layer, tensors[key], base) for layer, key in found.items()}


def _read_ours(
    row: Convention, tensors: Mapping[str, Tensor], found: dict[str, str]
) -> tuple[Convention, dict[str, Tensor]]:
    """A folder of ``interop.peft``: each core says what it belongs to."""
    names = [key.removesuffix("lora_R") + "lora_about" for key in found.values()]
    for name in names:
        if name not in tensors:
            raise ValueError(f"source: has no {name!r}; is it by loraxs_kernels.interop.peft?")
    abouts = [json.loads(bytes(tensors[name].tolist())) for name in names]
    if any(about["subspace"] != "top" for about in abouts):
        raise ValueError(
            "source: its bases are not the top singular vectors; no other row has that"
        )
    row = dataclasses.replace(row, sigma=abouts[0]["sigma"], sign=abouts[0]["sign"])
    return row, {layer: tensors[key].double() for layer, key in found.items()}


def _read_native(source: str | Path, row: Convention) -> Cores:
    metadata, tensors = checkpoint.read_files(source)
    config, modules = metadata["config"], metadata["modules"]
    if config["subspace"] != "top" or config["num_adapters"] is not None:
        raise ValueError("source: expected one core for each layer, over the top singular vectors")
    row = dataclasses.replace(row, sigma=config["sigma"], sign=config["sign"])
    R = {layer: tensors[f"{layer}.R"].double() for layer in modules}
    scaling = {layer: float(about["scaling"]) for layer, about in modules.items()}
    alpha = {layer: scaling[layer] * about["rank"] for layer, about in modules.items()}
    inside = tuple(f"{layer}." for layer in modules)
    extra = {key: value for key, value in tensors.items() if not key.startswith(inside)}
    return Cores(row, R, scaling, alpha, _bases(tensors, list(modules)), extra, config)


def _psoft(tensors: Mapping[str, Tensor], key: str, config: dict[str, Any]) -> Tensor:
    stem = key.removesuffix("weight")
    weight = tensors[key]
    vectors = {name: tensors.get(f"{stem}vector_{name}") for name in "ab"}
    if weight.dim() == 1:
        from peft.tuners.psoft.layer import OrthLayer

        size = config["r"]
        names = ("use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps")
        options = {name: config[name] for name in names if name in config}
        layer = OrthLayer(size, orth=True, mag_a=False, mag_b=False, **options).double()
        with torch.no_grad():
            layer.weight.copy_(weight)
            R = layer.get_matrix()
    else:
        R = weight.double()
    if vectors["b"] is not None:
        R = vectors["b"].double()[:, None] * R
    if vectors["a"] is not None:
        R = R * vectors["a"].double()[None, :]
    return R - torch.eye(len(R), dtype=R.dtype)


def _spans(
    tensors: Mapping[str, Tensor], found: dict[str, str], config: dict[str, Any]
) -> dict[str, Tensor]:
    """``R = sum_i v_i P_i``. Which vector is a layer's follows from its number, and that from P."""
    vectors = {
        key.rpartition(".")[2]: value for key, value in tensors.items() if "tinylora_v." in key
    }
    groups = max(1, round(len(found) * (1.0 - config.get("weight_tying", 0.0))))
    size = max(1, len(found) // groups)
    cores = {}
    for layer, key in found.items():
        P = tensors[key]
        number = _number(P, config.get("projection_seed", 42), len(found), layer)
        v = vectors.get(str(min(number // size, groups - 1)))
        if v is None:
            raise ValueError(f"source: has no tinylora_v for {layer!r}")
        cores[layer] = torch.einsum("i,ijk->jk", v.double(), P.double())
    return cores


def _number(P: Tensor, seed: int, layers: int, layer: str) -> int:
    for number in range(layers):
        generator = torch.Generator().manual_seed(seed + number)
        std = 1.0 / P.shape[1] ** 0.5
        drawn = torch.normal(mean=0.0, std=std, size=tuple(P.shape), generator=generator)
        if torch.equal(drawn.to(P.dtype), P):
            return number
    raise ValueError(f"source: tinylora_P of {layer!r} was not drawn with projection_seed={seed}")


def _unfolded(row: Convention, layer: str, folded: Tensor, base: Base | None) -> Tensor:
    """R from ``R V^T``."""
    if base is None:
        raise ValueError("base: is needed to take R out of R V^T; give the base model's weights")
    Vh, _ = bases(row, layer, base, len(folded))
    R = folded.double() @ Vh.mT
    if (R @ Vh - folded.double()).norm() > 1e-3 * folded.double().norm():
        raise ValueError(
            f"source: lora_A of {layer!r} is no product of a core and the singular vectors of the "
            "base weight; this is a plain LoRA, or that of another base model"
        )
    return R
