"""A small model and its adapter, shared by the tests of modules and files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import loraxs_kernels as lxk


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(24, 24)
        self.value = nn.Linear(24, 32)
        self.again = self.query
        self.classifier = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.value(self.again(torch.relu(self.query(x)))))


def config(**changes: Any) -> lxk.LoRAXSConfig:
    values: dict[str, Any] = {
        "rank": 4,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
        "alpha": 8.0,
        "r_std": 0.3,
    }
    return lxk.LoRAXSConfig(**{**values, **changes})


X = torch.randn(10, 24, generator=torch.Generator().manual_seed(2))
