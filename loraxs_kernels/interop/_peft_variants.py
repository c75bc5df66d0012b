"""PEFT's TinyLoRA and PSOFT on this package's kernels: both are ``s B (R (A x))`` with frozen A, B.

TinyLoRA builds R from a short trained vector, ``R = sum_i v_i P_i``; PSOFT trains a scaled
orthogonal matrix and applies ``R - I``. Here R is still built by PEFT's own code, so that its
parameters train as before; only the products with x, A, R, B and the base weight are ours.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraxs_kernels.functional import lora_xs_update
from loraxs_kernels.interop import _layers


class _Weight(NamedTuple):
    weight: Tensor


class _AsLora:
    """A TinyLoRA or PSOFT layer under the names of a LoRA layer, as ``_layers`` reads them."""

    def __init__(
        self,
        layer: Any,
        A: Mapping[str, Tensor],
        B: Mapping[str, Tensor],
        scaling: Mapping[str, float],
        dropout: nn.ModuleDict,
    ) -> None:
        self.layer = layer
        self.lora_A = {name: _Weight(A[name]) for name in scaling}
        self.lora_B = {name: _Weight(B[name]) for name in scaling}
        self.scaling, self.lora_dropout = scaling, dropout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def _tinylora(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = [name for name in self.active_adapters if name in self.tinylora_A]
    view = _AsLora(
        self, self.tinylora_A, self.tinylora_B, dict.fromkeys(names, 1.0), self.tinylora_dropout
    )
    return _forward(view, _cores(self, names, self._compute_R), x, args, kwargs).to(x.dtype)


def _psoft(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = [name for name in self.active_adapters if name in self.psoft_R]
    scaling = {name: self.scaling[name] for name in names}
    view = _AsLora(self, self._psoft_A_cache, self._psoft_B_cache, scaling, self.psoft_dropout)

    def core(name: str) -> Tensor:
        R = self._get_R_matrix(name)
        return R - torch.eye(len(R), dtype=R.dtype, device=R.device)

    return _forward(view, _cores(self, names, core), x, args, kwargs)


def _cores(layer: Any, names: list[str], core: Any) -> dict[str, Tensor]:
    # Not computed where they are not used.
    return {} if layer.disable_adapters or layer.merged else {name: core(name) for name in names}


def _forward(
    view: _AsLora, cores: dict[str, Tensor], x: Tensor, args: tuple[Any, ...], kwargs: Any
) -> Tensor:
    wide = {name for name in cores if view.lora_A[name].weight.dtype != x.dtype}
    if not wide or torch.is_autocast_enabled(x.device.type):
        return _layers.forward(view, cores, x, *args, **kwargs)
    # PSOFT keeps float32 bases over a 16-bit weight, and computes in their dtype.
    y = view.base_layer(x, *args, **kwargs)
    for name, R in cores.items():
        dtype = view.lora_A[name].weight.dtype
        side = _layers.side(view, name, R, dtype)
        y = lora_xs_update(y.to(dtype), x.to(dtype), **side)
    return y.to(x.dtype)


#: Where PEFT has the layers, and what replaces their forward pass.
_ROUTES = {
    "peft.tuners.tinylora.layer": _tinylora,
    "peft.tuners.psoft.layer": _psoft,
}


def accelerate(model: nn.Module) -> nn.Module:
    """Give the TinyLoRA and PSOFT linear layers of a PEFT model our forward pass, in place.

    What is saved stays theirs: only ``forward`` of each layer is replaced.

    Args:
        model: a model after ``get_peft_model`` with a ``TinyLoraConfig`` or ``PsoftConfig`` (PEFT
            0.19 and later), or one of their layers.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no such layer, or PEFT is too old to have them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    found = 0
    for path, forward in _ROUTES.items():
        try:
            cls = importlib.import_module(path).Linear
        except ModuleNotFoundError:
            continue
        for layer in model.modules():
            if isinstance(layer, cls):
                layer.forward = types.MethodType(forward, layer)
                found += 1
    if not found:
        raise ValueError("model: has no linear layer of PEFT's TinyLoRA or PSOFT")
    return model
