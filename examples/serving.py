"""One base model, many adapters: every request of a batch uses its own, or none.

python -m examples.serving
python -m examples.serving --adapters 256 --requests 64
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import loraxs_kernels as lxk

RANK, WIDTH = 16, 256


def make_base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def make_model(num_adapters: int | None) -> nn.Module:
    config = lxk.LoRAXSConfig(RANK, target_modules=["0", "2"], num_adapters=num_adapters)
    return lxk.inject_lora_xs(make_base(), config).eval()


def adapted(model: nn.Module) -> list[lxk.LoRAXSLinear]:
    return [m for m in model.modules() if isinstance(m, lxk.LoRAXSLinear)]


def machine() -> str:
    """What the printed times were taken on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def milliseconds(model: nn.Module, x: Tensor, repeats: int) -> float:
    """The median time of a forward pass."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--requests", type=int, default=32, help="sequences in the batch")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each request")
    options = parser.parse_args(argv)

    model = make_model(options.adapters)
    layers = adapted(model)
    for layer in layers:  # as if each core had been trained and copied in
        nn.init.normal_(layer.R, std=0.3)
    x = torch.randn(options.requests, options.tokens, WIDTH)
    ids = torch.randint(-1, options.adapters, (options.requests,))
    ids[0] = -1  # the base model alone
    # Checked and sorted here, once for all layers and for every later step of these requests.
    batch = lxk.AdapterBatch(ids, options.adapters)
    with lxk.use_adapters(model, batch):
        mixed = model(x)
        latency = milliseconds(model, x, 20)

    # Each request by itself, through a model with that one adapter.
    base, single = make_base(), make_model(None)
    alone = torch.empty_like(mixed)
    for i, adapter in enumerate(ids.tolist()):
        if adapter >= 0:
            for one, many in zip(adapted(single), layers, strict=True):
                one.R.copy_(many.R[adapter])
        alone[i] = base(x[i]) if adapter < 0 else single(x[i])
    torch.testing.assert_close(mixed, alone)  # raises, with what differs
    used = len(set(ids.tolist()) - {-1})
    print(f"{options.requests} requests x {options.tokens} tokens, {used} adapters in one batch, "
          f"{int((ids < 0).sum())} requests without: each as alone, within rounding")  # fmt: skip
    size = sum(layer.R.nbytes for layer in layers) / options.adapters
    print(f"{size:.0f} bytes for each of {options.adapters} adapters")
    plain = milliseconds(base, x, 20)
    print(f"{latency:.2f} ms for the batch, base model alone {plain:.2f} ms ({machine()})")


if __name__ == "__main__":
    main()
