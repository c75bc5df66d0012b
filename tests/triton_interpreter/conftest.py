"""These tests run in a process of their own, under TRITON_INTERPRET=1.

``tests/test_triton_interpreter.py`` starts it; in any other process nothing here is collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that an element that nobody writes shows."""
    from loraxs_kernels.backends import flags
    from loraxs_kernels.backends.triton import launch

    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(t: Tensor) -> Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() and t.device.type == "cpu" else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(launch, "plan_override", None)
    yield
    for held in flags._by_stream.values():
        assert not held.any(), "a launch left flags behind"
