"""Fixtures shared by the tests."""

from __future__ import annotations

from typing import Any

import pytest

from loraxs_kernels import _native

#: Tests that compile GPU kernels and execute them on a CPU, one thread each.
KERNELS = ("test_cuda_", "test_ptx_", "test_triton_")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under pytest-xdist the kernels' tests run beside each other and beside the others.

    These stay in one process, in their order: they take all cores, ports or the GPU themselves.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0].rpartition("/")[2]
            if file == "test_cuda_resources.py":
                return file  # reading the machine code takes longest, once per process
            return nodeid if file.startswith(KERNELS) else "others"

    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two long ones come first: at the end nothing would be left to run beside them."""
    items.sort(key=lambda item: item.path.name != "test_triton_interpreter.py")


@pytest.fixture(params=["reference", "onednn", "onednn-python", "onednn-unpacked"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way a call can run on the CPU."""
    if request.param == "onednn-python":
        monkeypatch.setattr(_native, "operators", lambda name="cpu": None)
    if request.param == "onednn-unpacked":
        monkeypatch.setenv("LORAXS_PREPACK", "0")
    return str(request.param.split("-")[0])
