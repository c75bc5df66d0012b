"""A PEFT layer with frozen bases A and B and a trained core R between them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from loraxs_kernels.backends import packing
from loraxs_kernels.checkpoint import basis_change_to, fingerprint
from loraxs_kernels.factors import LoRAXSFactors, check_rank
from loraxs_kernels.interop import _layers
from loraxs_kernels.weights import is_conv1d

#: Conventions that decide what R means, and so must be those it was trained with.
_CONVENTIONS = ("sigma", "sign", "subspace")


class _Basis(nn.Module):
    """A or B of one adapter. A buffer: whatever PEFT sets to trainable, this is not."""

    weight: Tensor

    def __init__(self, value: Tensor, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("weight", value, persistent=persistent)


class LoRAXSLayer(Linear):
    """``y = W x + b + s B (R (A x))`` in PEFT: ``lora_R`` trains, ``lora_A`` and ``lora_B`` do not.

    Args:
        base_layer: a linear layer, a Conv1D, or a quantized linear layer.
        adapter_name: of the first adapter.
        rank: r.
        alpha: scaling is ``alpha / r`` (``alpha / sqrt(r)`` with ``use_rslora``).
        config: a ``LoRAXSConfig``.

    Raises:
        TypeError, ValueError: the rank is too large for the layer.
    """

    #: What PEFT lets train, and what else it deletes with an adapter.
    adapter_layer_names = ("lora_R",)
    other_param_names = (
        *LoraLayer.other_param_names, "lora_A", "lora_B", "lora_S", "lora_about", "convention",
        "embedded", "check_base",
    )  # fmt: skip

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, rank: int, alpha: float, config: Any
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = self.is_target_conv_1d_layer = is_conv1d(base_layer)
        self.lora_R = nn.ParameterDict()
        #: For each saved core a JSON text in bytes: what it belongs to. Part of every state dict.
        self.lora_about = BufferDict(persistent=True)
        self.lora_S: dict[str, Tensor] = {}
        self.convention: dict[str, dict[str, Any]] = {}
        self.embedded: dict[str, bool] = {}
        self.check_base: dict[str, bool] = {}
        self._active_adapter = adapter_name
        self.add_adapter(adapter_name, rank, alpha, config)

    @property
    def has_plain_weight(self) -> bool:
        """Whether the base weight is a matrix of floating-point numbers, not a quantized one."""
        weight = self.get_base_layer().weight
        return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()

    # ------------------------------------------------------------------------------ adapters

    def add_adapter(self, name: str, rank: int, alpha: float, config: Any) -> None:
        """Make room for an adapter; :meth:`put_bases` and :meth:`put_core` fill it."""
        check_rank(rank, (self.out_features, self.in_features))
        dropout = config.lora_dropout
        self.r[name], self.lora_alpha[name] = rank, alpha
        self.scaling[name] = alpha / (rank**0.5 if config.use_rslora else rank)
        self.use_rslora = {**getattr(self, "use_rslora", {}), name: config.use_rslora}
        self.use_dora[name] = self.lora_bias[name] = False
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.lora_R[name] = nn.Parameter(torch.empty(rank, rank))
        self.embedded[name], self.check_base[name] = config.embed_bases, config.check_base
        options = config.factor_options()
        keys = (*_CONVENTIONS, "seed")
        self.convention[name] = {"rank": rank, **{key: options[key] for key in keys}}
        self.set_adapter(self.active_adapters)

    def twin(self, name: str) -> str | None:
        """An adapter of this layer that has the very bases that ``name`` is to get."""
        if self.embedded[name]:
            return None
        for other, convention in self.convention.items():
            filled = other in self.lora_S and not self.embedded[other]
            if other != name and filled and convention == self.convention[name]:
                return other
        return None

    def put_bases(self, name: str, found: LoRAXSFactors, weight_hash: str | None) -> None:
        """Set A, B and S, and the description of what R belongs to."""
        self._set_bases(name, found.A, found.B)
        self.lora_S[name] = found.S
        about = {
            "format": 1,
            "rank": self.r[name],
            "scaling": self.scaling[name],
            **{key: self.convention[name][key] for key in _CONVENTIONS},
            "weight_sha256": weight_hash,
            **fingerprint(found.A, found.S),
        }
        self._set_about(name, about)

    def share_bases(self, name: str, other: str) -> None:
        """Use the bases of another adapter: the same tensors, so that they cost nothing more."""
        for modules in (self.lora_A, self.lora_B):
            modules[name] = _Basis(modules[other].weight, persistent=False)
        self.lora_S[name] = self.lora_S[other]
        self._set_about(name, {**self.about(other), "scaling": self.scaling[name]})

    def put_core(self, name: str, start: Tensor) -> None:
        """Set R's start; it trains if it did before."""
        trains = self.lora_R[name].requires_grad
        self.lora_R[name] = nn.Parameter(start, requires_grad=trains)

    def _set_bases(self, name: str, A: Tensor, B: Tensor) -> None:
        self.lora_A[name] = _Basis(A, self.embedded[name])
        self.lora_B[name] = _Basis(B, self.embedded[name])

    def about(self, name: str) -> dict[str, Any]:
        """What the core of an adapter belongs to."""
        return _parse(self.lora_about[name])

    def _set_about(self, name: str, about: Mapping[str, Any]) -> None:
        data = bytearray(json.dumps(about, sort_keys=True).encode())
        self.lora_about[name] = torch.frombuffer(data, dtype=torch.uint8).clone()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """PEFT's, but for the dtype: R stays in float32 over a 16-bit weight."""
        target = self.get_base_layer().weight.device if device is None else device
        core = self.lora_R[adapter_name]
        if core.device not in (target, torch.device("meta")):
            moved = nn.Parameter(core.detach().to(target), requires_grad=core.requires_grad)
            self.lora_R[adapter_name] = moved
        for modules in (self.lora_A, self.lora_B):
            if adapter_name in modules:
                modules[adapter_name].to(target)

    # ------------------------------------------------------------------------------ computing

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As a LoRA layer of PEFT, ``adapter_names`` included."""
        cores: Any = self.lora_R
        return _layers.forward(self, cores, x, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``s B R A`` in the layout of the base weight."""
        return _layers.delta_weight(self, self.lora_R[adapter], adapter)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight.

        Raises:
            TypeError: the base weight is quantized.
        """
        if not self.has_plain_weight:
            raise TypeError(
                f"merge: the base layer is a quantized {type(self.get_base_layer()).__name__}, "
                "expected a floating-point weight; dequantize the model first"
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        # PEFT writes through .data, which packed copies do not see.
        packing.invalidate_packed(self.get_base_layer())

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again."""
        super().unmerge()
        packing.invalidate_packed(self.get_base_layer())

    # ------------------------------------------------------------------------------ loading

    def read_saved(
        self, name: str, state: Mapping[str, Tensor], prefix: str
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Check that a saved core belongs to this layer.

        Args:
            name: of the adapter.
            state: a state dict with the core.
            prefix: of this layer's keys in it, with the dot.

        Returns:
            the saved description, and the orthogonal T with ``A_saved = T A_here`` (``None`` if the
            bases were saved too).

        Raises:
            ValueError: the core has another rank, scaling, convention, base weight or basis.
        """
        where = f"adapter {name!r}, layer {prefix[:-1]!r}"
        text, core = state.get(f"{prefix}lora_about.{name}"), state[f"{prefix}lora_R.{name}"]
        if text is None:
            raise ValueError(
                f"{where}: has R but no lora_about, expected both as save_pretrained writes them; "
                "cores of other libraries are converted by: python -m loraxs_kernels convert"
            )
        about, here = _parse(text), self.about(name)
        embedded = f"{prefix}lora_A.{name}.weight" in state
        keys = ("rank", "scaling") if embedded else ("rank", "scaling", *_CONVENTIONS)
        for key in keys:
            if about.get(key) != here[key]:
                raise ValueError(
                    f"{where}: the saved core has {key} {about.get(key)!r}, expected "
                    f"{here[key]!r} as the model has; {_advice(key, about.get(key))}"
                )
        if core.shape != self.lora_R[name].shape:
            raise ValueError(
                f"{where}: lora_R has shape {list(core.shape)}, "
                f"expected {list(self.lora_R[name].shape)}"
            )
        hashes = (about.get("weight_sha256"), here["weight_sha256"])
        if self.check_base[name] and None not in hashes and hashes[0] != hashes[1]:
            raise ValueError(
                f"{where}: the base weight is not the one that the adapter was trained on (SHA-256 "
                "differs; another dtype is another weight); load that base model, or, if the "
                "difference is meant, set check_base=False"
            )
        if embedded:
            return about, None
        change = basis_change_to(about, self.lora_A[name].weight, self.lora_S[name])
        if change is None:
            raise ValueError(
                f"{where}: the bases found here differ from those that the adapter was trained on "
                "by more than signs and rotations of equal singular values; save it with "
                "embed_bases=True"
            )
        return about, change

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Turn the bases to those that a saved core was trained with, then load it.

        ``B R A`` stays what it was when saved: ``R`` is taken as it is, and ``A' = T A``,
        ``B' = B T^T``.
        """
        for name in list(self.lora_R):
            if f"{prefix}lora_R.{name}" not in state_dict:
                continue
            about, change = self.read_saved(name, state_dict, prefix)
            if change is not None:
                self._turn(name, change)
            self._set_about(name, {**about, "weight_sha256": self.about(name)["weight_sha256"]})
            state_dict[f"{prefix}lora_about.{name}"] = self.lora_about[name]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _turn(self, name: str, change: Tensor) -> None:
        if torch.equal(change, torch.eye(len(change), dtype=change.dtype)):
            return
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        T = change.to(A.device)
        # New tensors: another adapter may share the old ones.
        self._set_bases(name, (T @ A.double()).to(A.dtype), (B.double() @ T.mT).to(B.dtype))
        self.convention[name] = {**self.convention[name], "turned": True}


def _parse(data: Tensor) -> dict[str, Any]:
    try:
        about = json.loads(bytes(data.cpu().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"lora_about: is not a JSON text: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"lora_about: got {type(about).__name__}, expected a JSON object")
    return about


def _advice(key: str, value: Any) -> str:
    """How to load a core whose ``key`` is ``value``."""
    setting = {"rank": "r", "scaling": "lora_alpha"}.get(key, key)
    if key in ("sigma", "sign", "scaling"):
        return (
            f"load it with the adapter_config.json beside it (or {setting} to match), or convert "
            "it: python -m loraxs_kernels convert"
        )
    return f"load it with the adapter_config.json beside it (or {setting} to match)"
