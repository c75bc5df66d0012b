"""What ptxas made of the CUDA kernels: registers, memory, spills, matrix instructions.

Read off the built library by cuobjdump, for every architecture it holds. ``python -m
tools.kernel_table`` prints the same numbers beside those of the Triton kernels.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton, whose wheel brings cuobjdump, is not installed")

from loraxs_kernels.backends.cuda import plan
from tests.cuda_device import require_library
from tools.cuda_resources import Resources, find

require_library()

FOUND = find()
REGISTERS, SHARED, STATIC = 65536, {80: 163 * 1024, 90: 227 * 1024}, 1024


def test_every_kernel_is_there_for_its_architectures() -> None:
    archs, table = plan.kernels()
    for k in table:
        for arch in archs:
            there = (k.name, arch) in FOUND
            assert there == (not k.exact_arch or arch == "9.0a"), (k.name, arch)


@pytest.mark.parametrize(("name", "arch"), FOUND, ids="-".join)
def test_resources(name: str, arch: str) -> None:
    r: Resources = FOUND[name, arch]
    k = next(k for k in plan.kernels()[1] if k.name == name)
    assert r.spills == 0 and r.local == 0 and r.stack == 0
    assert r.registers <= 255 and r.registers * k.threads <= REGISTERS
    limit = SHARED[90 if k.exact_arch else 80]
    assert r.static + k.shared + STATIC <= limit + STATIC, "shared memory"
    wanted = {"HGMMA", "UTMALDG", "USETMAXREG"} if k.exact_arch else {"HMMA", "LDGSTS"}
    assert wanted <= r.instructions
