"""Factors on disk: one safetensors file per weight and settings.

A file is written beside its place and renamed, so readers and other writers see all of it or
nothing. It holds a checksum of its own, so that whatever happened to it later is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from loraxs_kernels._version import __version__
from loraxs_kernels.factors import LoRAXSFactors
from loraxs_kernels.weights import weight_hash

#: Raised when the same settings give other factors than before.
FORMAT = 1

ENVIRONMENT = "LORAXS_CACHE"


def cache_key(weight: Tensor, rank: int, options: Mapping[str, Any]) -> str:
    """What the factors depend on, as a name for a file: the weight's dtype, shape and bytes, the
    rank, every option of ``lora_xs_factors``, the version of this library."""
    facts = {
        "format": FORMAT,
        "version": __version__,
        "weight": weight_hash(weight),
        "rank": rank,
        "options": dict(options),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class FactorCache:
    """A folder of factors.

    Args:
        directory: is made if it does not exist; may be shared by any number of processes.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    @classmethod
    def at(cls, directory: str | Path | None) -> FactorCache | None:
        """The cache in ``directory``; for ``None`` the one that LORAXS_CACHE names, if it does."""
        chosen = os.environ.get(ENVIRONMENT) if directory is None else directory
        return cls(chosen) if chosen else None

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.directory / f"{key}.safetensors"

    def load(self, key: str) -> LoRAXSFactors | None:
        """The factors of a key; ``None`` where there is no file, or (with a warning) a bad one."""
        path = self.path(key)
        try:
            tensors = load(path.read_bytes())
            found = LoRAXSFactors(*(tensors[name] for name in LoRAXSFactors._fields))
            if not torch.equal(tensors["sha256"], _checksum(key, found)):
                raise ValueError("the checksum is wrong")
        except FileNotFoundError:
            return None
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            warnings.warn(f"cache: {path} is damaged and will be replaced ({error})", stacklevel=2)
            return None
        return found

    def store(self, key: str, factors: LoRAXSFactors) -> None:
        """Write the factors of a key. A full or read-only disk costs a warning, not the result."""
        tensors = {n: t.cpu().contiguous() for n, t in factors._asdict().items()}
        data = save({**tensors, "sha256": _checksum(key, LoRAXSFactors(**tensors))})
        part = None
        try:
            with tempfile.NamedTemporaryFile(dir=self.directory, suffix=".part", delete=False) as f:
                part = Path(f.name)
                f.write(data)
            part.replace(self.path(key))
        except OSError as error:
            if part is not None:
                part.unlink(missing_ok=True)
            warnings.warn(f"cache: nothing was kept in {self.directory}: {error}", stacklevel=2)


def _checksum(key: str, factors: LoRAXSFactors) -> Tensor:
    """SHA-256 of the key and the tensors, uint8 ``[32]``."""
    digest = hashlib.sha256(key.encode())
    for tensor in factors:
        digest.update(weight_hash(tensor).encode())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
