"""EigenTune's LoRA-XS (its method "spectral_core") on these kernels: train, compare, save, reload.

    python -m examples.eigentune_core

EigenTune makes, saves and loads the model; `accelerate` only changes what computes the update.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import eigentune
import torch
from torch import nn

from loraxs_kernels.interop import eigentune as ours


def make_base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))


def make_model() -> Any:
    config = eigentune.EigenTuneConfig(
        rank=8, method="spectral_core", target_modules=["0", "2"], backend="torch"
    )
    return eigentune.get_eigentune_model(make_base(), config)


def train(model: Any, teacher: Any, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 64, generator=generator)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(argv)

    # What is to be learned: the output of the same network with other cores.
    teacher = make_model()
    for name, parameter in teacher.named_parameters():
        if name.endswith(".core"):
            nn.init.normal_(parameter, std=0.3)
    theirs, model = make_model(), ours.accelerate(make_model())
    for name, trained in (("EigenTune's own backend", theirs), ("this one", model)):
        first, *_, last = train(trained, teacher, options.steps)
        print(f"loss {first:.4f} -> {last:.4f} with {name}")

    x = torch.randn(256, 64)
    with tempfile.TemporaryDirectory() as folder:
        # Nothing of ours is in the files: EigenTune alone loads them, and we load what it wrote.
        eigentune.save_adapter(model, f"{folder}/ours")
        torch.testing.assert_close(
            eigentune.load_adapter(make_base(), f"{folder}/ours")(x), model(x)
        )
        eigentune.save_adapter(theirs, f"{folder}/theirs")
        loaded = ours.accelerate(eigentune.load_adapter(make_base(), f"{folder}/theirs"))
        torch.testing.assert_close(loaded(x), theirs(x))
    print("each saved, and loaded with the other backend: the same output within rounding")


if __name__ == "__main__":
    main()
