"""The same training twice, through PEFT and the Trainer: on this package's layers and eagerly.

Both start from the same numbers and see the same batches. They take turns of a few steps, each turn
by a Trainer that goes on with the optimizer of the turn before, so that whatever else the machine
does meets both. ``python -m examples.peft_trainer --compare`` runs it.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from loraxs_kernels.interop.peft import LoRAXSLayer

TURN = 5  # steps
UNTIMED = 3  # the first steps allocate, pack and choose kernels


def eager_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What PEFT and the official code run: the base layer, then A, R and B one after the other."""
    (name,) = layer.active_adapters
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    side = F.linear(F.linear(F.linear(layer.lora_dropout[name](x), A), layer.lora_R[name]), B)
    return layer.base_layer(x) + layer.scaling[name] * side


def eager_twin(model: nn.Module) -> nn.Module:
    """A copy of a model whose LoRA-XS layers run eagerly."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, LoRAXSLayer):
            module.forward = functools.partial(eager_forward, module)  # type: ignore[method-assign]
    return twin


@dataclass
class Run:
    """One way to train: the model with its optimizer, and what was seen of each step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, steps: int, learning_rate: float) -> Run:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return cls(model, optimizer, schedule)

    def steps_per_second(self) -> float:
        """Of the median step, the first few left out."""
        return 1 / statistics.median(self.seconds[UNTIMED:] or self.seconds)


class _Clock(transformers.TrainerCallback):
    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        _wait()
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        _wait()
        self._seconds.append(time.perf_counter() - self._start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Trainer(transformers.Trainer):
    """Takes batches as they are, in their order, and keeps the loss with all its digits."""

    losses: list[float]

    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        self.losses.append(loss.item())
        return found


def _turn(run: Run, batches: Sequence[Mapping[str, Tensor]], folder: str) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=len(batches), save_strategy="no", logging_strategy="no",
        report_to=[], disable_tqdm=True, log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = _Trainer(
        model=run.model, args=arguments, train_dataset=batches,
        optimizers=(run.optimizer, run.schedule), callbacks=[_Clock(run.seconds)],
    )  # fmt: skip
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.losses = run.losses
    trainer.train()


def compare(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    folder: str | Path,
    *,
    learning_rate: float,
    exact: bool = False,
) -> dict[str, Run]:
    """Train ``model`` (a PEFT model with LoRA-XS layers) and its eager twin on the same batches.

    Args:
        model: trained in place.
        batches: the keyword arguments of the model's forward, one mapping for each step.
        folder: for the Trainer's output.
        learning_rate: of the first step; it falls linearly to zero.
        exact: also train a float64 copy eagerly, to see how far rounding takes the other two.

    Returns:
        ``"ours"``, ``"eager"`` and, if asked for, ``"float64"``.
    """
    models = {"ours": model, "eager": eager_twin(model)}
    if exact:
        models["float64"] = eager_twin(model).double()
    runs = {name: Run.of(m, len(batches), learning_rate) for name, m in models.items()}
    for number, start in enumerate(range(0, len(batches), TURN)):
        names = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in names:
            _turn(runs[name], batches[start : start + TURN], str(folder))
    return runs


def report(runs: Mapping[str, Run]) -> str:
    """The losses and how far they lie apart, and the speeds."""
    ours, eager = runs["ours"], runs["eager"]
    gaps = [abs(a - b) for a, b in zip(ours.losses, eager.losses, strict=True)]
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    lines = [
        f"loss {_mean(ours.losses[:5]):.4f} -> {_mean(ours.losses[-5:]):.4f} (means of five steps)",
        f"largest difference of the two loss curves: {gaps[worst]:.1e} at step {worst + 1} of "
        f"{len(gaps)}, where the loss is {ours.losses[worst]:.4f}",
    ]
    if "float64" in runs:
        exact = runs["float64"].losses
        far = {
            name: max(abs(a - b) for a, b in zip(runs[name].losses, exact, strict=True))
            for name in ("ours", "eager")
        }
        lines.append(
            f"largest difference to float64: {far['ours']:.1e} with this package, "
            f"{far['eager']:.1e} eagerly"
        )
    speeds = ours.steps_per_second(), eager.steps_per_second()
    lines.append(
        f"steps per second (median step): {speeds[0]:.2f} with this package, {speeds[1]:.2f} "
        f"eagerly: {speeds[0] / speeds[1]:.3f} times as fast"
    )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
