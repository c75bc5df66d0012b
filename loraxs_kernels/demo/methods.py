"""The ways to fine-tune that the demo compares, and how each is put on, saved and loaded.

LoRA-XS goes through this package, LoRA and VeRA (the paper's two baselines) through ``peft``. All
adapt the same modules and train the classifier besides; "classifier alone" trains nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import loraxs_kernels as lxk

from .model import HEAD, SnippetClassifier

# The paper's choice for encoders: query, value and both output projections of each layer.
TARGET_MODULES = ["query", "value", "attention.output.dense", "output.dense"]
HEAD_FILE = "classifier.safetensors"

Kind = Literal["head", "lora-xs", "vera", "lora"]


@dataclass(frozen=True)
class Method:
    """One row of the table. ``rank`` is 0 where there is no adapter."""

    key: str
    label: str
    kind: Kind
    rank: int
    adapter_lr: float
    head_lr: float = 1e-3


# Learning rates: for each method the best of four, a factor of two apart (rank 64: of three; the
# classifier alone: of three, a factor of four apart), after one pass over 3,200 snippets in batches
# of 16, judged on 1,000 snippets that are not among those of the table. The error of that judgement
# is 0.013, so neighbours are hardly told apart. For rank 4 and VeRA the best is the highest tried.
# Scaling is 1 everywhere (alpha = rank).
METHODS = (
    Method("head", "classifier alone", "head", 0, 0.0, head_lr=4e-3),
    Method("lora-xs-4", "LoRA-XS, r = 4", "lora-xs", 4, 3.2e-2),
    Method("lora-xs-16", "LoRA-XS, r = 16", "lora-xs", 16, 8e-3),
    Method("lora-xs-64", "LoRA-XS, r = 64", "lora-xs", 64, 2e-3),
    Method("vera", "VeRA, r = 64", "vera", 64, 4e-2),
    Method("lora", "LoRA, r = 8", "lora", 8, 2e-3),
)


def attach(model: SnippetClassifier, method: Method, seed: int) -> tuple[nn.Module, float]:
    """Freeze the model but for its classifier, and add the method's adapter.

    Returns:
        The model to train (``peft`` wraps it, this package works in place) and the seconds that the
        initial values took: for LoRA-XS that is the singular value decomposition of every adapted
        weight, for the others 0.
    """
    torch.manual_seed(seed)
    if method.kind == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(HEAD))
        return model, 0.0
    if method.kind == "lora-xs":
        config = lxk.LoRAXSConfig(
            rank=method.rank, target_modules=TARGET_MODULES, modules_to_save=[HEAD], seed=seed
        )
        started = time.perf_counter()
        return lxk.inject_lora_xs(model, config), time.perf_counter() - started
    return _attach_peft(model, method, seed), 0.0


def _attach_peft(model: SnippetClassifier, method: Method, seed: int) -> nn.Module:
    import peft

    config: peft.PeftConfig
    with quiet_vera():
        if method.kind == "lora":
            config = peft.LoraConfig(
                r=method.rank,
                lora_alpha=method.rank,
                target_modules=TARGET_MODULES,
                modules_to_save=[HEAD],
            )
        else:
            # The random projections follow from the key, so the file need not hold them.
            config = peft.VeraConfig(
                r=method.rank,
                target_modules=TARGET_MODULES,
                modules_to_save=[HEAD],
                projection_prng_key=seed,
                save_projection=False,
            )
        return peft.get_peft_model(model, config)


@contextlib.contextmanager
def quiet_vera() -> Iterator[None]:
    """Without ``peft``'s warnings that projections drawn anew may differ: the demo checks that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not (save|load) vera_A and vera_B")
        yield


def trained_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that train: those of the adapter, and those of the classifier."""
    adapter: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if HEAD in name.split(".") else adapter).append(parameter)
    return adapter, head


def count(parameters: list[nn.Parameter]) -> int:
    """How many numbers the parameters hold."""
    return sum(parameter.numel() for parameter in parameters)


def save(model: nn.Module, method: Method, directory: Path) -> int:
    """Write what was trained to an empty folder; returns the bytes of its files.

    ``peft`` also writes a model card, which is not counted.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if method.kind == "head":
        save_file(model.get_submodule(HEAD).state_dict(), directory / HEAD_FILE)
    elif method.kind == "lora-xs":
        lxk.save_adapter(model, directory)
    else:
        # "auto" would ask a model hub whether the vocabulary was extended.
        model.save_pretrained(directory, save_embedding_layers=False)  # type: ignore[operator]
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".md"]
    return sum(path.stat().st_size for path in files)


def load(model: SnippetClassifier, method: Method, directory: Path) -> nn.Module:
    """Put what :func:`save` wrote on a fresh copy of the model."""
    if method.kind == "head":
        model.classifier.load_state_dict(load_file(directory / HEAD_FILE))
        return model
    if method.kind == "lora-xs":
        return lxk.load_adapter(model, directory)
    import peft

    with quiet_vera():
        return peft.PeftModel.from_pretrained(model, directory)


class EagerLoRAXSLinear(nn.Module):
    """A LoRA-XS layer in plain PyTorch calls, one after the other: what the speed-up is against.

    It shares the frozen tensors of a :class:`loraxs_kernels.LoRAXSLinear`, copies its core, and
    computes the same.
    """

    A: torch.Tensor
    B: torch.Tensor

    def __init__(self, layer: lxk.LoRAXSLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        self.bias = (
            None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        )
        self.register_buffer("A", layer.A.detach())
        self.register_buffer("B", layer.B.detach())
        self.R = nn.Parameter(layer.R.detach().clone())
        self.scaling = layer.scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        side = F.linear(F.linear(F.linear(x, self.A), self.R), self.B)
        return F.linear(x, self.weight, self.bias) + side * self.scaling


def eager_twin(model: nn.Module) -> nn.Module:
    """A copy of a model with LoRA-XS layers that runs them as :class:`EagerLoRAXSLinear`."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, lxk.LoRAXSLinear):
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, EagerLoRAXSLinear(module))
    return twin
