"""Fixtures shared by the tests."""

from __future__ import annotations

import pytest

from loraxs_kernels import _native


@pytest.fixture(params=["reference", "onednn", "onednn-python", "onednn-unpacked"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way a call can run on the CPU."""
    if request.param == "onednn-python":
        monkeypatch.setattr(_native, "operators", lambda name="cpu": None)
    if request.param == "onednn-unpacked":
        monkeypatch.setenv("LORAXS_PREPACK", "0")
    return str(request.param.split("-")[0])
