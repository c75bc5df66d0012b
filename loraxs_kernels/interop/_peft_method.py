"""LoRA-XS among the methods of PEFT: its configuration, its model, its registration."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraModel
from peft.utils import register_peft_method
from peft.utils.integrations import dequantize_module_weight, get_bnb_param_type
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from loraxs_kernels import factors
from loraxs_kernels.initialization import FactorCache, Job, initial_factors
from loraxs_kernels.interop._peft_layer import LoRAXSLayer
from loraxs_kernels.weights import dense_matrix, is_conv1d, weight_hash

#: The PEFT type, in capitals in ``adapter_config.json``.
NAME = "LORAXS"


def _peft_type() -> PeftType:
    """The member ``LORAXS`` of PEFT's enumeration of its methods, which has no place for others.

    An unknown type is what makes PEFT refuse a file, so this must be a type of its own; and PEFT's
    look-ups want a member of the enumeration.
    """
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
    return member


_TYPE = _peft_type()

#: Settings of ``LoraConfig`` that have the same meaning here.
_TAKEN = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices", "runtime_config",
})  # fmt: skip


@dataclass
class LoRAXSConfig(LoraConfig):
    """Settings of a LoRA-XS adapter for PEFT; a ``LoraConfig`` with these in addition.

    Args:
        sigma, sign, r_init, r_std, subspace, seed: see
            :func:`~loraxs_kernels.factors.lora_xs_factors`; the defaults are the paper's.
        embed_bases: whether A and B are saved too. Larger files; needed where the bases cannot be
            found again (another quantization of the base weight, say).
        check_base: whether a saved adapter is refused if the base weight is not the one that it was
            trained on, bit for bit.
        cache_dir: a folder that keeps the factors, as in :func:`~loraxs_kernels.inject_lora_xs`;
            it is not saved.

    ``fan_in_fan_out`` needs no setting: it is found from the layer. Settings of ``LoraConfig`` that
    make another method of it (``use_dora``, ``init_lora_weights="pissa"``, ...) are refused.

    Raises:
        TypeError, ValueError: a value is wrong; the message names it.
    """

    sigma: str = field(default="A", metadata={"help": "where the singular values go"})
    sign: str | None = field(default="u", metadata={"help": "sign rule of the SVD: u, v or None"})
    r_init: str = field(default="normal", metadata={"help": "what R starts at"})
    r_std: float = field(default=1e-5, metadata={"help": "standard deviation of R's start"})
    subspace: str = field(default="top", metadata={"help": "which singular vectors"})
    seed: int = field(default=0, metadata={"help": "of the SVD and of R's start"})
    embed_bases: bool = field(default=False, metadata={"help": "whether A and B are saved"})
    check_base: bool = field(default=True, metadata={"help": "whether base weights are compared"})
    cache_dir: str | None = field(default=None, metadata={"help": "folder that keeps factors"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _TYPE
        factors.check_options(self.sigma, self.sign, self.r_init, self.r_std, self.subspace)
        factors.check_seed(self.seed)
        stock = LoraConfig()
        for name in sorted({f.name for f in fields(LoraConfig)} - _TAKEN):
            value, default = getattr(self, name), getattr(stock, name)
            if value != default:
                raise ValueError(
                    f"{name}: got {value!r}, expected {default!r}; LoRA-XS has no such setting"
                )

    def to_dict(self) -> dict[str, Any]:
        """What is saved: all but what holds on this machine only."""
        values: dict[str, Any] = super().to_dict()
        values.pop("cache_dir")
        return values

    def factor_options(self) -> dict[str, Any]:
        """The keyword arguments for :func:`~loraxs_kernels.factors.lora_xs_factors`."""
        names = ("sigma", "sign", "r_init", "r_std", "subspace", "seed")
        return {name: getattr(self, name) for name in names}


class LoRAXSModel(LoraModel):
    """PEFT's wrapper of a base model with LoRA-XS layers in it (its ``BaseTuner``)."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put the layers of an adapter in, then find all their bases at once.

        Raises:
            TypeError, ValueError: a layer cannot be adapted, or its weight has no SVD.
            RuntimeError: an adapter is merged into the weights.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LoRAXSLayer) and adapter_name in module.lora_R
        }
        try:
            _initialize(layers, adapter_name, self.peft_config[adapter_name])
        except BaseException:
            for layer in layers.values():
                layer.delete_adapter(adapter_name)
            raise

    def _create_and_replace(
        self,
        lora_config: LoRAXSConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        ranks, alphas = lora_config.rank_pattern, lora_config.alpha_pattern
        rank = ranks.get(get_pattern_key(ranks.keys(), current_key), lora_config.r)
        alpha = alphas.get(get_pattern_key(alphas.keys(), current_key), lora_config.lora_alpha)
        if isinstance(target, LoRAXSLayer):
            if target.merged:
                raise RuntimeError(
                    f"{current_key}: {target.merged_adapters} are merged into the weight that the "
                    "SVD is to be of; call unmerge_adapter() first"
                )
            target.add_adapter(adapter_name, rank, alpha, lora_config)
            return
        if not (isinstance(target, nn.Linear) or is_conv1d(target) or _is_quantized(target)):
            raise ValueError(
                f"target_modules: {current_key!r} is a {type(target).__name__}, expected a linear "
                "layer, a Conv1D, or a quantized linear layer whose weight has dequantize()"
            )
        layer = LoRAXSLayer(target, adapter_name, rank, alpha, lora_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # The tensors of a LoRAXSLayer are made where the base weight is: nothing has to move.
        setattr(parent, child_name, new_module)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it averages A and B, which are frozen here.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "add_weighted_adapter: LoRA-XS adapters have fixed A and B; average their lora_R, or "
            "convert them with loraxs_kernels.interop.convert.to_lora"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Check a saved adapter against all layers, before the first tensor is overwritten."""
        layers = {
            f"{prefix}{_plain(name)}.": module
            for name, module in self.named_modules()
            if isinstance(module, LoRAXSLayer)
        }
        keys = {_plain(key): key for key in state_dict}
        # A layer that the model lacks has no place for the adapter's name either.
        saved = [(f"{key}.").rpartition(".lora_R.")[::2] for key in keys if ".lora_R" in key]
        saved = [(path, adapter.rstrip(".")) for path, adapter in saved]
        for path, adapter in saved:
            if path + "." not in layers or adapter not in layers[path + "."].lora_R:
                raise ValueError(
                    f"adapter {adapter!r}: the model has no such LoRA-XS layer: {path!r}"
                )
        for path, layer in layers.items():
            for adapter in sorted({adapter for _, adapter in saved} & set(layer.lora_R)):
                if f"{path}lora_R.{adapter}" not in keys:
                    raise ValueError(f"adapter {adapter!r}: has no lora_R for {path[:-1]!r}")
                layer.read_saved(adapter, {k: state_dict[v] for k, v in keys.items()}, path)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _plain(name: str) -> str:
    """A name without what FSDP and torch.compile put into it."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")


def _is_quantized(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if weight is None or not hasattr(module, "in_features"):
        return False
    plain = type(weight) in (Tensor, nn.Parameter)
    return bool(get_bnb_param_type(weight)) or (not plain and hasattr(weight, "dequantize"))


def _base_matrix(layer: LoRAXSLayer, name: str) -> Tensor:
    """The base weight ``[out, in]`` as floating-point numbers."""
    base = layer.get_base_layer()
    if get_bnb_param_type(base.weight):
        return dense_matrix(lambda: dequantize_module_weight(base), name)
    return dense_matrix(base, name)


def _initialize(layers: dict[str, LoRAXSLayer], adapter: str, config: LoRAXSConfig) -> None:
    """Give every layer its A, B and start of R; layers are decomposed in parallel."""
    twins = {name: layer.twin(adapter) for name, layer in layers.items()}
    jobs = [
        Job(name, _base_matrix(layer, name).detach(), layer.r[adapter])
        for name, layer in layers.items()
        if twins[name] is None
    ]
    found = initial_factors(jobs, config.factor_options(), cache=FactorCache.at(config.cache_dir))
    generator = torch.Generator().manual_seed(config.seed)
    for name, layer in layers.items():
        twin = twins[name]
        if twin is None:
            base = layer.get_base_layer().weight
            plain = isinstance(base, nn.Parameter) and layer.has_plain_weight
            layer.put_bases(adapter, found[name], weight_hash(base) if plain else None)
        else:
            layer.share_bases(adapter, twin)
        S = layer.lora_S[adapter]
        start = factors.start_of_core(config.r_init, S, config.r_std, generator)
        layer.put_core(adapter, start)


if _TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(
        name=NAME.lower(), config_cls=LoRAXSConfig, model_cls=LoRAXSModel, prefix="lora_"
    )
