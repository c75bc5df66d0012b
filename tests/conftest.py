"""Fixtures of all tests."""

from __future__ import annotations

import pytest
import torch

from loraxs_kernels import dispatch
from loraxs_kernels.backends import _native

pytest.register_assert_rewrite("tests.oracle")

#: Every way a call can run on the CPU: the backend, with or without the compiled operators and
#: packed copies.
PATHS = ("reference", "onednn", "onednn-unpacked", "onednn-python", "onednn-python-unpacked")


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts from the same random state and without settings of the environment."""
    torch.manual_seed(0)
    for name in ("LORAXS_BACKEND", "LORAXS_PREPACK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend, set up to run in one of its ways."""
    name, *how = str(request.param).split("-")
    why_not = dispatch.unavailable(name)
    if why_not:
        pytest.skip(why_not)
    if "python" in how:
        monkeypatch.setattr(_native, "operators", lambda: None)
    elif name == "onednn" and _native.load():
        pytest.skip(f"compiled operators: {_native.load()}")
    if "unpacked" in how:
        monkeypatch.setenv("LORAXS_PREPACK", "0")
    return name
