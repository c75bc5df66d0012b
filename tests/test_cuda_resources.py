"""What ptxas made of the CUDA kernels: registers, memory, spills, matrix instructions.

Read off the built library by cuobjdump, for every architecture it holds. ``python -m
tools.kernel_table`` prints the same numbers beside those of the Triton kernels.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton, whose wheel brings cuobjdump, is not installed")

from loraxs_kernels.backends.cuda import plan
from tests.cuda_device import require_library
from tools.cuda_resources import find
from tools.triton_resources import GPUS

require_library()

ARCHS, KERNELS = plan.kernels()
REGISTERS = 65536
#: Bytes of shared memory that a CTA may use on architectures that GPUS does not name.
LEAST_SHARED = min(gpu.shared for gpu in GPUS.values())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("k", KERNELS, ids=lambda k: k.name)
def test_resources(k: plan.Kernel, arch: str) -> None:
    found = find()
    if k.exact_arch and arch != "9.0a":
        assert (k.name, arch) not in found
        return
    r = found[k.name, arch]
    assert r.spills == 0 and r.local == 0 and r.stack == 0
    assert r.registers <= 255 and r.registers * k.threads <= REGISTERS
    gpu = GPUS.get(int(arch.rstrip("a").replace(".", "")))
    assert r.static + k.shared <= (gpu.shared if gpu else LEAST_SHARED), "shared memory"
    wanted = {"HGMMA", "UTMALDG", "USETMAXREG"} if k.exact_arch else {"HMMA", "LDGSTS"}
    assert wanted <= r.instructions
