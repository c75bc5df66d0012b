"""Put LoRA-XS layers into a model, in place, and take them out again."""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loraxs_kernels import factors
from loraxs_kernels.factors import LoRAXSFactors
from loraxs_kernels.initialization import FactorCache, Job, initial_factors
from loraxs_kernels.nn import LoRAXSLinear, check_settings
from loraxs_kernels.weights import is_conv1d

Bases = tuple[Tensor, Tensor, Tensor]
_FACTOR_OPTIONS = ("sigma", "sign", "r_init", "r_std", "subspace", "seed")


@dataclass(frozen=True)
class LoRAXSConfig:
    """Which layers get an adapter, and of what kind.

    Args:
        rank: r of every layer that ``rank_pattern`` does not name.
        target_modules: layers to adapt. A string, or each string of a sequence, matches a module
            whose full name it equals, whose name ends in ``.`` and it, or whose full name it
            matches as a regular expression.
        alpha: ``None`` for scaling 1, otherwise scaling = alpha / rank (each layer's own rank).
        dropout: probability of dropping an element of the adapter's input while training.
        rank_pattern: ranks of particular layers, by the same kind of pattern; the first match
            counts.
        modules_to_save: modules that train besides R, by the same kind of pattern (a classifier,
            say).
        num_adapters: ``None`` for one core per layer, or n cores chosen per row.
        sigma, sign, r_init, r_std, subspace, seed: see
            :func:`~loraxs_kernels.factors.lora_xs_factors`.
        backend: ``None`` to choose, or a backend's name.
        prepack: whether the CPU backend may keep packed copies of the frozen matrices.

    Raises:
        TypeError, ValueError: a value is wrong; the message names it.
    """

    rank: int
    _: dataclasses.KW_ONLY
    target_modules: str | tuple[str, ...] | list[str]
    alpha: float | None = None
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] | None = None
    modules_to_save: tuple[str, ...] | list[str] | None = None
    num_adapters: int | None = None
    sigma: str = "A"
    sign: str | None = "u"
    r_init: str = "normal"
    r_std: float = 1e-5
    subspace: str = "top"
    seed: int = 0
    backend: str | None = None
    prepack: bool = True

    def __post_init__(self) -> None:
        patterns_to_ranks = {} if self.rank_pattern is None else self.rank_pattern
        if not isinstance(patterns_to_ranks, Mapping):
            raise TypeError(
                f"rank_pattern: got {type(patterns_to_ranks).__name__}, expected a mapping"
            )
        ranks: dict[str, Any] = {"rank": self.rank}
        for pattern, rank in patterns_to_ranks.items():
            if not isinstance(pattern, str):
                raise TypeError(f"rank_pattern: got key {pattern!r}, expected a string")
            ranks[f"rank_pattern[{pattern!r}]"] = rank
        _check_patterns("rank_pattern", patterns_to_ranks)
        for label, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"{label}: got {type(rank).__name__}, expected int")
            if not 1 <= rank <= 512:
                raise ValueError(f"{label}: got {rank}, expected 1 to 512")
        for field in ("target_modules", "modules_to_save"):
            value = getattr(self, field)
            if value is None and field == "modules_to_save":
                continue
            patterns = (value,) if isinstance(value, str) else value
            if not isinstance(patterns, (tuple, list)) or not all(
                isinstance(p, str) for p in patterns
            ):
                raise TypeError(f"{field}: got {value!r}, expected a string or a list of strings")
            if not patterns:
                raise ValueError(f"{field}: got an empty list, expected at least one name")
            _check_patterns(field, patterns)
            object.__setattr__(self, field, tuple(patterns))
        check_settings(self.alpha, self.dropout, self.num_adapters, self.backend, self.prepack)
        factors.check_options(self.sigma, self.sign, self.r_init, self.r_std, self.subspace)
        factors.check_seed(self.seed)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-able values."""
        return {
            f.name: dict(v) if isinstance(v := getattr(self, f.name), Mapping) else v
            for f in dataclasses.fields(self)
            if f.name != "_"
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAXSConfig:
        """The configuration that :meth:`to_dict` wrote.

        Raises:
            TypeError, ValueError: an unknown or a missing key, or a wrong value.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"config: got {type(values).__name__}, expected a mapping")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted({"rank", "target_modules"} - set(values))
        if unknown or missing:
            raise ValueError(f"config: unknown keys {unknown}, missing keys {missing}")
        return cls(**values)


def _check_patterns(field: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{field}: {pattern!r} is not a regular expression: {error}"
            ) from error


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the full name, a suffix of the dotted path, or a regex for it."""
    return (
        name == pattern or name.endswith("." + pattern) or re.fullmatch(pattern, name) is not None
    )


def _near_misses(patterns: Iterable[str], names: list[str]) -> str:
    tails = {name.rsplit(".", 1)[-1] for name in names}
    found: list[str] = []
    for pattern in patterns:
        found += difflib.get_close_matches(pattern, sorted(tails | set(names)), n=4, cutoff=0.5)
    listed = list(dict.fromkeys(found)) or sorted(tails)[:12]
    return ", ".join(repr(n) for n in listed) or "none: the model has no linear layer"


def _select(field: str, patterns: Iterable[str], names: list[str]) -> list[str]:
    """Names that match a pattern; an error if there is none, a warning per fruitless pattern."""
    patterns = list(patterns)
    chosen = [name for name in names if any(matches(p, name) for p in patterns)]
    if not chosen:
        raise ValueError(
            f"{field}: {patterns} match no module; near: {_near_misses(patterns, names)}"
        )
    for pattern in patterns:
        if not any(matches(pattern, name) for name in chosen):
            near = _near_misses([pattern], names)
            warnings.warn(f"{field}: {pattern!r} matches no module; near: {near}", stacklevel=4)
    return chosen


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _targets(model: nn.Module, config: LoRAXSConfig) -> dict[str, nn.Module]:
    """The layers to adapt by name; a layer that stands in several places has several names."""
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if n and _is_linear(m)}
    chosen = _select("target_modules", config.target_modules, list(linears))
    saved = config.modules_to_save or ()
    chosen = [
        name for name in chosen
        if not any(matches(p, part) for p in saved for part in _prefixes(name))
    ]  # fmt: skip
    for name in chosen:
        module = linears[name]
        if type(module) is not nn.Linear and not is_conv1d(module):
            raise ValueError(
                f"target_modules: {name!r} is a {type(module).__name__}, a subclass whose forward "
                "may not be that of a linear layer; expected torch.nn.Linear or Conv1D"
            )
    if not chosen:
        raise ValueError("target_modules: every match is also in modules_to_save")
    # A layer that stands in several places is replaced in all of them, whichever name matched.
    ids = {id(linears[name]) for name in chosen}
    return {name: module for name, module in linears.items() if id(module) in ids}


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _rank_of(name: str, config: LoRAXSConfig) -> int:
    for pattern, rank in (config.rank_pattern or {}).items():
        if matches(pattern, name):
            return rank
    return config.rank


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def plan(
    model: nn.Module, config: LoRAXSConfig, bases: Mapping[str, Bases] | None = None,
    *, progress: bool = False, cache_dir: str | Path | None = None, share: bool = False,
) -> tuple[dict[str, LoRAXSLinear], list[str]]:  # fmt: skip
    """The layers that an injection would put in, and the modules to save; changes no module.

    The caller passes both to :func:`commit`, or restores the frozen flags by dropping the plan with
    :func:`discard`.
    """
    if not isinstance(config, LoRAXSConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a LoRAXSConfig")
    if lora_xs_layers(model):
        raise ValueError("model: has LoRA-XS layers already; eject_lora_xs(model) first")
    targets = _targets(model, config)
    if bases is not None and set(bases) != set(targets):
        raise ValueError(f"bases: given for {sorted(bases)}, the layers are {sorted(targets)}")
    for pattern in config.rank_pattern or {}:
        _select("rank_pattern", [pattern], list(targets))
    saved: list[str] = []
    if config.modules_to_save:
        names = [
            n for n, m in model.named_modules() if n and next(m.parameters(), None) is not None
        ]
        saved = _select("modules_to_save", config.modules_to_save, names)
    known: Mapping[str, Bases | LoRAXSFactors] = {}
    if bases is not None:
        known = bases
    else:
        cache = FactorCache.at(cache_dir)
        jobs = _jobs(targets, config)
        options = {key: getattr(config, key) for key in _FACTOR_OPTIONS}
        known = initial_factors(jobs, options, progress=progress, cache=cache, share=share)
    made: dict[int, LoRAXSLinear] = {}
    layers: dict[str, LoRAXSLinear] = {}
    try:
        for name, module in targets.items():
            if id(module) not in made:
                try:
                    made[id(module)] = _make_layer(name, module, config, known.get(name))
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{name}: {error}") from error
            layers[name] = made[id(module)]
    except BaseException:
        discard(layers)
        raise
    return layers, saved


def _jobs(targets: dict[str, nn.Module], config: LoRAXSConfig) -> list[Job]:
    """The layers that need an SVD: each module once, and none whose weight has no numbers."""
    first = {id(module): name for name, module in reversed(targets.items())}
    jobs = []
    for name, module in targets.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        if first[id(module)] == name and not weight.is_meta:
            matrix = weight.detach().t() if is_conv1d(module) else weight.detach()
            jobs.append(Job(name, matrix, _rank_of(name, config)))
    return jobs


def _make_layer(
    name: str, module: nn.Module, config: LoRAXSConfig, bases: Bases | LoRAXSFactors | None
) -> LoRAXSLinear:
    return LoRAXSLinear.from_linear(
        module, _rank_of(name, config), alpha=config.alpha, dropout=config.dropout,
        num_adapters=config.num_adapters, sigma=config.sigma, sign=config.sign,
        r_init=config.r_init, r_std=config.r_std, subspace=config.subspace, seed=config.seed,
        backend=config.backend, prepack=config.prepack,
        bases=bases,
    )  # fmt: skip


def discard(layers: Mapping[str, LoRAXSLinear]) -> None:
    """Give the parameters of planned layers their former ``requires_grad`` back."""
    for layer in layers.values():
        layer.weight.requires_grad_(layer.trained_before[0])
        if layer.bias is not None:
            layer.bias.requires_grad_(layer.trained_before[1])


#: In eval mode these compute from the weights of their linear layers, past the layers' own forward
#: and so past the adapter, unless the attribute has this value.
_SHORTCUTS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def _close_shortcuts(model: nn.Module) -> list[tuple[str, str, Any]]:
    """Make PyTorch's transformer layers call their adapted layers; returns what eject restores."""
    before = []
    for name, module in model.named_modules():
        for kind, (attribute, value) in _SHORTCUTS.items():
            adapted = any(isinstance(m, LoRAXSLinear) for m in module.modules())
            if isinstance(module, kind) and adapted:
                before.append((name, attribute, getattr(module, attribute)))
                setattr(module, attribute, value)
    return before


def commit(
    model: nn.Module, config: LoRAXSConfig, layers: Mapping[str, LoRAXSLinear], saved: list[str]
) -> None:
    """Put planned layers in place and freeze everything but R and the modules to save."""
    trained = [n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    for name, layer in layers.items():
        # Planning has frozen these already.
        flags = zip(("weight", "bias"), layer.trained_before, strict=True)
        trained += [f"{name}.{parameter}" for parameter, flag in flags if flag]
        _replace(model, name, layer)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers.values():
        layer.R.requires_grad_(True)
    for name in saved:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(True)
    # Plain attributes, so that they are copied and pickled with the model and enter no state_dict.
    model.__dict__["_lora_xs"] = {
        "config": config, "saved": saved, "trained_before": trained,
        "shortcuts": _close_shortcuts(model),
    }  # fmt: skip


def inject_lora_xs(
    model: nn.Module,
    config: LoRAXSConfig,
    *,
    progress: bool = False,
    cache_dir: str | Path | None = None,
    share: bool = True,
) -> nn.Module:
    """Put a LoRA-XS adapter on the chosen linear layers, in place, and freeze the rest.

    Weights and biases are taken over, not copied. After an error the model is unchanged. On the CPU
    several layers are decomposed at once, one thread each (see docs/svd.md).

    Args:
        model: any module with ``nn.Linear`` or GPT-2 ``Conv1D`` layers.
        config: which layers, and of what kind.
        progress: whether to show a progress bar over the layers.
        cache_dir: a folder that keeps the factors, so that the next injection with the same weights
            and settings reads them, also after a run that was cut short; ``None``: the folder that
            the environment variable LORAXS_CACHE names, or none. Damaged files are replaced, with a
            warning.
        share: with ``torch.distributed`` initialized, whether the ranks divide the layers whose
            weights they all hold. Every rank must then make this call; ``False`` for a call that
            only some of them make.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: nothing matches (the message lists near misses), a layer is of a kind
            that cannot be adapted, the rank is too large for it, or the model has adapters already.
        RuntimeError: another rank could not initialize its layers.
        OSError: ``cache_dir`` cannot be made.
    """
    layers, saved = plan(model, config, progress=progress, cache_dir=cache_dir, share=share)
    commit(model, config, layers, saved)
    return model


def eject_lora_xs(model: nn.Module) -> nn.Module:
    """Undo :func:`inject_lora_xs`: the original layers with the original weights and flags.

    Merged layers are unmerged first; to keep an adapter's effect, call ``merge`` and copy the
    weight.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no LoRA-XS layers.
    """
    layers = lora_xs_layers(model)
    if not layers:
        raise ValueError("model: has no LoRA-XS layers")
    state = model.__dict__.pop("_lora_xs", None)
    made: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        if id(layer) not in made:
            made[id(layer)] = layer.to_linear()
        _replace(model, name, made[id(layer)])
    if state is not None:
        trained = set(state["trained_before"])
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in trained)
        for name, attribute, value in state["shortcuts"]:
            setattr(model.get_submodule(name), attribute, value)
    return model


def lora_xs_layers(model: nn.Module) -> dict[str, LoRAXSLinear]:
    """The LoRA-XS layers of a model by name.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    modules = model.named_modules(remove_duplicate=False)
    return {n: m for n, m in modules if n and isinstance(m, LoRAXSLinear)}


def injection_state(model: nn.Module) -> tuple[LoRAXSConfig, list[str]]:
    """The configuration a model was injected with, and the names of its modules to save.

    Raises:
        ValueError: the model was not injected.
        TypeError: it is not a module.
    """
    state = model.__dict__.get("_lora_xs") if lora_xs_layers(model) else None
    if state is None:
        raise ValueError("model: has no LoRA-XS adapter; expected one made by inject_lora_xs")
    return state["config"], state["saved"]
