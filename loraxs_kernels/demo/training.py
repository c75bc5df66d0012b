"""Training, judging, and timing the same layers run in two ways side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import loraxs_kernels as lxk

from .data import Batch
from .methods import EagerLoRAXSLinear, Method, trained_parameters

WARMUP = 0.06  # share of the steps in which the learning rates rise
UNTIMED_STEPS = 3  # the first steps allocate, pack and choose kernels


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Trainer:
    """AdamW on what trains, learning rates rising shortly and then falling linearly to zero.

    Args:
        model: In training mode from here on.
        method: Gives the learning rates.
        total_steps: How many times :meth:`step` will be called.
        device: Of the model and the batches.
    """

    model: nn.Module
    method: Method
    total_steps: int
    device: torch.device
    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        adapter, head = trained_parameters(self.model)
        groups: list[dict[str, object]] = [{"params": head, "lr": self.method.head_lr}]
        if adapter:
            groups.append({"params": adapter, "lr": self.method.adapter_lr})
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        rise = max(1, round(WARMUP * self.total_steps))
        fall = max(1, self.total_steps - rise)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min((step + 1) / rise, (self.total_steps - step) / fall)
        )
        self.model.train()

    def step(self, batch: Batch) -> float:
        """One step on one batch; returns its loss, and notes how long it took."""
        synchronize(self.device)
        started = time.perf_counter()
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self.model(batch.ids, batch.mask), batch.labels)
        loss.backward()
        self._optimizer.step()
        synchronize(self.device)
        self.milliseconds.append((time.perf_counter() - started) * 1e3)
        self._schedule.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def median_ms(self) -> float:
        """Median time of a step, the first few left out if there are more."""
        return median_ms(self.milliseconds)


def median_ms(milliseconds: Sequence[float]) -> float:
    """The median, without the first :data:`UNTIMED_STEPS` where that leaves any."""
    return statistics.median(milliseconds[UNTIMED_STEPS:] or milliseconds)


@torch.no_grad()
def predict(
    model: nn.Module, batches: Sequence[Batch], on_batch: Callable[[], None] | None = None
) -> torch.Tensor:
    """The model's scores, float32 [examples, 2] on the CPU, in the order of the batches."""
    model.eval()
    scores = []
    for batch in batches:
        scores.append(model(batch.ids, batch.mask).float().cpu())
        if on_batch is not None:
            on_batch()
    return torch.cat(scores)


def accuracy(scores: torch.Tensor, batches: Sequence[Batch]) -> float:
    """Share of the examples whose higher score is that of their label."""
    labels = torch.cat([batch.labels for batch in batches]).cpu()
    return (scores.argmax(dim=1) == labels).double().mean().item()


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds for forward and backward of all adapted layers, one after another (medians)."""

    layers: int
    ours_ms: float
    eager_ms: float
    bare_ms: float


class BareLinear(nn.Module):
    """The frozen linear layer under an adapter, alone: the least that any adapter can cost."""

    def __init__(self, layer: lxk.LoRAXSLinear) -> None:
        super().__init__()
        self.weight = layer.weight.detach()
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out]."""
        return F.linear(x, self.weight, self.bias)


def time_layers(
    model: nn.Module, batch: Batch, device: torch.device, repeats: int = 12
) -> LayerTimes:
    """Time the LoRA-XS layers of a model alone, on what they see when the model reads ``batch``.

    Ours, eager and bare run in turns, whole model after whole model, so that whatever else the
    machine does meets all three. Weights, cores and inputs are the same.
    """
    inputs = _layer_inputs(model, batch)
    ours: list[nn.Module] = list(inputs)
    variants: dict[str, list[nn.Module]] = {
        "ours": ours,
        "eager": [EagerLoRAXSLinear(layer).to(device) for layer in inputs],
        "bare": [BareLinear(layer) for layer in inputs],
    }
    generator = torch.Generator().manual_seed(0)
    work = [
        (x, torch.randn(*x.shape[:-1], layer.out_features, generator=generator).to(x))
        for layer, x in inputs.items()
    ]
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for repeat in range(repeats + UNTIMED_STEPS):
        for name in names if repeat % 2 == 0 else reversed(names):
            times[name].append(_forward_backward_ms(variants[name], work, device))
    medians = {name: median_ms(values) for name, values in times.items()}
    return LayerTimes(len(inputs), medians["ours"], medians["eager"], medians["bare"])


def _layer_inputs(model: nn.Module, batch: Batch) -> dict[lxk.LoRAXSLinear, torch.Tensor]:
    """What each LoRA-XS layer is given when the model reads the batch."""
    seen: dict[lxk.LoRAXSLinear, torch.Tensor] = {}

    def note(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, lxk.LoRAXSLinear)
        seen[layer] = args[0].detach().clone()

    layers = [module for module in model.modules() if isinstance(module, lxk.LoRAXSLinear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            model(batch.ids, batch.mask)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _forward_backward_ms(
    layers: Sequence[nn.Module],
    work: Sequence[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
) -> float:
    inputs = [x.detach().requires_grad_() for x, _ in work]
    for layer in layers:
        layer.zero_grad()
    synchronize(device)
    started = time.perf_counter()
    for layer, x, (_, upstream) in zip(layers, inputs, work, strict=True):
        layer(x).backward(upstream)
    synchronize(device)
    return (time.perf_counter() - started) * 1e3
