"""What the official implementation does, written down from its description as a reference.

A PEFT LoRA layer gets bases from scikit-learn's TruncatedSVD of the transposed weight and a linear
layer between them; its forward pass is five PyTorch calls.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.decomposition import TruncatedSVD
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "reconstruction_type": "svd",
    "reconstr_mode": "separated",
    "half_init_dec": False,
    "replacement_module_random_init": False,
    "r_squared": True,
    "svd": {"n_iter": 10, "random_state": 42, "rank": 4},
}


def find_and_initialize(model: nn.Module, adapter: str = "default", n_iter: int = 10) -> None:
    for module in list(model.modules()):
        if adapter not in getattr(module, "lora_A", ()):
            continue
        layer: Any = module
        rank = layer.lora_A[adapter].weight.shape[0]
        svd = TruncatedSVD(n_components=rank, n_iter=n_iter, random_state=42)
        weight = layer.get_base_layer().weight.detach()
        weight = weight if layer.fan_in_fan_out else weight.T
        encoder = svd.fit_transform(weight.float().numpy())
        dtype = layer.lora_A[adapter].weight.dtype
        layer.lora_A[adapter].weight = nn.Parameter(
            torch.tensor(encoder.T.copy(), dtype=dtype), requires_grad=False
        )
        layer.lora_B[adapter].weight = nn.Parameter(
            torch.tensor(svd.components_.T.copy(), dtype=dtype), requires_grad=False
        )
        core = nn.Linear(rank, rank, bias=False)
        nn.init.normal_(core.weight, std=1e-5)
        setattr(layer, f"{adapter}_lora_latent_mapping", core)
        layer.forward = types.MethodType(forward_latent, layer)


def forward_latent(self: Any, x: Tensor) -> Tensor:
    weight = self.weight.T if self.fan_in_fan_out else self.weight
    result = F.linear(x, weight, self.bias)
    if self.disable_adapters or self.merged:
        return result
    name = self.active_adapters[0]
    A, B = self.lora_A[name], self.lora_B[name]
    core = getattr(self, f"{name}_lora_latent_mapping")
    inner = A(self.lora_dropout[name](x.to(A.weight.dtype)))
    side = B(core(inner)) * self.scaling[name]
    return (result + side).to(x.dtype)
