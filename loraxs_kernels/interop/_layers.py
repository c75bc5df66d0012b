"""The forward pass of a PEFT LoRA layer that has a core R between lora_A and lora_B.

Shared by the routes whose modules are ``peft.tuners.lora.Linear`` with something in between.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraxs_kernels import factors, ops
from loraxs_kernels.adapters import AdapterBatch
from loraxs_kernels.backends import packing
from loraxs_kernels.functional import lora_xs_linear, lora_xs_update
from loraxs_kernels.weights import is_conv1d

#: What PEFT calls rows without an adapter in a mixed batch.
BASE = "__base__"


def forward(
    layer: Any, cores: Mapping[str, Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """What ``peft.tuners.lora.Linear.forward`` does, with ``s B (R (A x))`` as the update.

    Args:
        layer: a PEFT LoRA layer over a linear layer (quantized or not).
        cores: R of each adapter, ``[r, r]``.
        x: ``[..., in]``.
        args, kwargs: passed on to the base layer, but for ``adapter_names``: one name for each
            sample of the batch.

    Returns:
        ``[..., out]`` in the dtype of the base layer's output.
    """
    names = kwargs.pop("adapter_names", None)
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
        return layer.base_layer(x, *args, **kwargs)
    if names is not None:
        if len(names) != len(x):
            raise ValueError(f"adapter_names: got {len(names)} names, expected {len(x)} as x has")
        if layer.merged:
            raise ValueError(
                "adapter_names: got names while an adapter is merged; unmerge it first"
            )
        return _mixed(layer, cores, x, names, args, kwargs)
    if layer.merged:
        return layer.base_layer(x, *args, **kwargs)
    active = [name for name in layer.active_adapters if name in cores]
    y = None
    if active and not args and not kwargs:
        y = _fused(layer, x, active[0], cores[active[0]])
    if y is None:
        y = layer.base_layer(x, *args, **kwargs)
    else:
        active = active[1:]
    for name in active:
        y = lora_xs_update(y, _like(x, y), **side(layer, name, cores[name], y.dtype))
    return y


def delta_weight(layer: Any, core: Tensor, adapter: str) -> Tensor:
    """``s B R A`` in the base layer's layout (``[in, out]`` for a Conv1D), in lora_B's dtype."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    delta = factors.delta_weight(A.detach(), core.detach(), B.detach(), layer.scaling[adapter])
    delta = delta.to(B.dtype)
    return delta.T if layer.fan_in_fan_out else delta


def _fused(
    layer: Any,
    x: Tensor,
    name: str,
    core: Tensor,
    batch: AdapterBatch | None = None,
) -> Tensor | None:
    """Base and adapter in one operation; ``None`` where the base is no plain linear layer."""
    base = layer.get_base_layer()
    if base is not layer.base_layer or not isinstance(base.weight, nn.Parameter):
        return None
    weight: Tensor = base.weight
    if weight.requires_grad or not weight.is_floating_point():
        return None
    if is_conv1d(base):
        # One view for all calls: packed copies belong to a tensor object.
        stored = weight
        weight = packing.bundle(("transposed",), (stored,), lambda: (stored.detach().t(), True))
    elif type(base) is not nn.Linear:
        return None
    operands = side(layer, name, core, x.dtype)
    return lora_xs_linear(x, weight, bias=base.bias, adapter_ids=batch, **operands)


def side(layer: Any, name: str, core: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The adapter's arguments; its frozen bases in ``dtype``, converted once."""
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout = layer.lora_dropout[name]
    drops = layer.training and isinstance(dropout, nn.Dropout)
    return {
        "A": packing.dense(A.detach() if A.requires_grad else A, "dense", dtype, ops.PREPACK_NOW),
        "R": core if core.dtype in (torch.float32, dtype) else core.float(),
        "B": packing.dense(B.detach() if B.requires_grad else B, "dense", dtype, ops.PREPACK_NOW),
        "scaling": float(layer.scaling[name]),
        "dropout_p": float(dropout.p) if drops else 0.0,
    }


def _like(x: Tensor, y: Tensor) -> Tensor:
    return x if x.dtype == y.dtype else x.to(y.dtype)


# ---------------------------------------------------------------------------------- mixed batches


@functools.lru_cache(maxsize=64)
def _batch(names: tuple[str, ...], known: tuple[str, ...], device: torch.device) -> AdapterBatch:
    """Ids of the samples: an AdapterBatch is made once, not once per layer."""
    ids = [known.index(name) if name in known else -1 for name in names]
    return AdapterBatch(torch.tensor(ids, device=device), len(known))


def _mixed(
    layer: Any,
    cores: Mapping[str, Tensor],
    x: Tensor,
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """A batch whose samples use different adapters: one operation where these share their bases."""
    # Not every layer has every adapter; that one of them has it, PEFT checks once for the model.
    known = tuple(dict.fromkeys(n for n in names if n != BASE and n in cores))
    if not known:
        return layer.base_layer(x, *args, **kwargs)
    if _share_bases(layer, known):
        batch = _batch(tuple(names), known, x.device)
        R = torch.stack([cores[name] for name in known])
        y = None if args or kwargs else _fused(layer, x, known[0], R, batch)
        if y is None:
            y = layer.base_layer(x, *args, **kwargs)
            operands = side(layer, known[0], R, y.dtype)
            y = lora_xs_update(y, _like(x, y), adapter_ids=batch, **operands)
        return y
    y = layer.base_layer(x, *args, **kwargs)
    for name in known:
        rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
        part, inputs = y.index_select(0, rows), x.index_select(0, rows)
        part = lora_xs_update(part, _like(inputs, y), **side(layer, name, cores[name], y.dtype))
        y = y.index_copy(0, rows, part)
    return y


def _share_bases(layer: Any, names: Sequence[str]) -> bool:
    """Whether adapters have the same A, B, scaling and dropout: then only R differs from row to
    row."""
    first, *others = names
    one = side(layer, first, torch.empty(0), layer.lora_A[first].weight.dtype)
    for name in others:
        other = side(layer, name, torch.empty(0), layer.lora_A[name].weight.dtype)
        if (one["scaling"], one["dropout_p"]) != (other["scaling"], other["dropout_p"]):
            return False
        for basis in ("A", "B"):
            if not _same(one[basis], other[basis]):
                return False
    return True


def _same(a: Tensor, b: Tensor) -> bool:
    """Equality of two frozen tensors, found out once."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    result: bool = packing.bundle(("same", id(b)), (a, b), lambda: (torch.equal(a, b), True))
    return result
