"""The official LoRA-XS implementation's models on these kernels: initialize, train, save, merge.

    python -m examples.official

The official repository puts a matrix R into the layers of a PEFT LoRA model. `official.initialize`
stands in for its `find_and_initialize`; a model that theirs has made already takes
`official.patch(model)` instead.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from loraxs_kernels.interop import official

# As in the official config/reconstruct_config.yaml.
RECONSTRUCT: dict[str, Any] = {
    "reconstruction_type": "svd",
    "reconstr_mode": "separated",
    "half_init_dec": False,
    "replacement_module_random_init": False,
    "r_squared": True,
    "svd": {"n_iter": 10, "random_state": 42, "rank": 8},
}


def make_model(r_std: float) -> Any:
    """A small network with the official layers in it."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=8, target_modules=["0", "2"]))
    # The SVDs, in place of the repository's:
    #     find_and_initialize(model, peft_config, adapter_name="default", ...)
    return official.initialize(model, RECONSTRUCT, r_std=r_std)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(argv)

    # What is to be learned: the output of the same network with other cores.
    teacher, model = make_model(r_std=0.3), make_model(r_std=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(options.steps):
        x = torch.randn(64, 64)
        loss = nn.functional.mse_loss(model(x), teacher(x).detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    numbers = sum(p.numel() for p in trained)
    print(f"{numbers} trained numbers, loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    x = torch.randn(256, 64)
    want = model(x)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter_model.safetensors"
        # The keys are the official ones: its code loads the file, and ours loads its files.
        official.save_cores(model, file)
        loaded = official.load_cores(make_model(r_std=1e-5), file)
        print(f"saved {file.stat().st_size} bytes of cores")
    torch.testing.assert_close(loaded(x), want, rtol=0, atol=0)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), want)
    print("loaded: the same output; merged into plain linear layers: the same within rounding")


if __name__ == "__main__":
    main()
