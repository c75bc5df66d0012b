"""Fixtures shared by the tests."""

from __future__ import annotations

import pytest

from loraxs_kernels import _native

#: Tests that compile GPU kernels and execute them on a CPU, one thread each.
KERNELS = ("test_cuda_", "test_ptx_", "test_triton_")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist the kernels' tests run beside each other and beside the others.

    These stay in one process, in their order: they take all cores, ports or the GPU themselves.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if not item.path.name.startswith(KERNELS):
            item.add_marker(pytest.mark.xdist_group("others"))
    # Two long ones: not last, when nothing is left to run beside them.
    items.sort(key=lambda item: item.path.name != "test_triton_interpreter.py")


@pytest.fixture(params=["reference", "onednn", "onednn-python", "onednn-unpacked"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way a call can run on the CPU."""
    if request.param == "onednn-python":
        monkeypatch.setattr(_native, "operators", lambda name="cpu": None)
    if request.param == "onednn-unpacked":
        monkeypatch.setenv("LORAXS_PREPACK", "0")
    return str(request.param.split("-")[0])
