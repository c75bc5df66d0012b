"""How the CUDA library is built, and what it needs; see setup.py.

A CUDA build of torch, a CUDA toolkit of the same major version (CUDA_HOME, or nvcc on PATH) and the
headers of CUTLASS (the package nvidia-cutlass, or CUTLASS_PATH). A GPU is not asked for: the
architectures are those of TORCH_CUDA_ARCH_LIST, or DEFAULT_ARCHS. Sources for any GPU become PTX
once, for 8.0, and ptxas makes the machine code of each architecture from it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension

from setup_native import (
    COMPILE_FLAGS,
    ROOT,
    NativeBuildError,
    Torch,
    compile_all,
    find_cxx,
    find_torch,
    link,
    run,
    version_line,
    work_folder,
)

#: What is built where TORCH_CUDA_ARCH_LIST says nothing, as far as the toolkit knows it.
DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
OLDEST_NVCC = (12, 0)  # the first with C++20
OLDEST_ARCH = 80
#: What the PTX of a source is for, unless its folder says otherwise.
GENERIC_ARCH = "8.0"
#: Folders of csrc/cuda whose files are compiled for one architecture alone.
FOLDER_ARCH = {"sm90": "9.0a"}
INSTALL_CUTLASS = "pip install --no-deps nvidia-cutlass"
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
]


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit. ``archs``: the compute capabilities it compiles for, times ten."""

    nvcc: Path
    version: tuple[int, int]
    include: Path
    cudart: Path
    archs: frozenset[int]

    @property
    def name(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]}"


def find_nvcc() -> Path:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            nvcc = Path(home, "bin", "nvcc")
            if not nvcc.is_file():
                raise NativeBuildError(
                    f"{variable} is {home}, but there is no {nvcc}; set it to the folder of a CUDA "
                    "toolkit"
                )
            return nvcc
    found = shutil.which("nvcc")
    if found is None:
        raise NativeBuildError(
            "no CUDA toolkit found: nvcc is not on PATH and CUDA_HOME is not set "
            "(https://developer.nvidia.com/cuda-downloads; a driver or a GPU is not needed)"
        )
    return Path(found)


def find_toolkit() -> Toolkit:
    nvcc = find_nvcc()
    text = run([str(nvcc), "--version"], "asking nvcc for its version")
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise NativeBuildError(f"{nvcc} --version names no release: {text.strip()!r}")
    version = int(release[1]), int(release[2])
    if version < OLDEST_NVCC:
        raise NativeBuildError(
            f"{nvcc} is of CUDA {version[0]}.{version[1]}, which is too old: C++20 needs "
            f"{OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}; install a newer CUDA toolkit"
        )
    archs = run([str(nvcc), "--list-gpu-arch"], "asking nvcc for its architectures")
    home = _home(nvcc)
    return Toolkit(
        nvcc,
        version,
        _below(home, "include/cuda_runtime.h").parent,
        _below(home, "lib64/libcudart_static.a", "lib/libcudart_static.a"),
        frozenset(int(n) for n in re.findall(r"compute_(\d+)", archs)),
    )


def _home(nvcc: Path) -> Path:
    """The toolkit's folder, as nvcc itself sees it: what is on PATH may be a link or a script."""
    dry = [str(nvcc), "--dryrun", "-x", "cu", "-c", "-"]
    # A dry run is printed to standard error, which `run` passes on; here it is wanted.
    told = run(["sh", "-c", f"{shlex.join(dry)} 2>&1"], "asking nvcc where its toolkit is", "")
    top = re.search(r"TOP=(.*)", told)
    if top is None:
        raise NativeBuildError(f"{nvcc} --dryrun does not say where its toolkit is")
    return Path(top[1].strip()).resolve()


def _below(home: Path, *names: str) -> Path:
    targets = [home, *sorted(home.glob("targets/*"))]
    for place in targets:
        for name in names:
            if (place / name).is_file():
                return place / name
    raise NativeBuildError(
        f"the CUDA toolkit at {home} has no {names[0]}; install its development files (cudart-dev)"
    )


def check_torch(torch: Torch, toolkit: Toolkit) -> None:
    assert torch.cuda is not None
    if int(torch.cuda.split(".")[0]) != toolkit.version[0]:
        major = torch.cuda.split(".")[0]
        raise NativeBuildError(
            f"torch {torch.version} is built with CUDA {torch.cuda}, but {toolkit.nvcc} is of CUDA "
            f"{toolkit.version[0]}.{toolkit.version[1]}: the major versions must be the same; set "
            f"CUDA_HOME to a toolkit {major}.x, or install a torch for CUDA {toolkit.version[0]}"
        )


def find_cutlass() -> Path:
    """The folder with ``cute/tensor.hpp``."""
    named = os.environ.get("CUTLASS_PATH")
    places = [Path(named, "include"), Path(named)] if named else []
    if not named:
        spec = importlib.util.find_spec("cutlass_library")
        found = list(spec.submodule_search_locations or ()) if spec else []
        places = [Path(place, "source", "include") for place in found]
    for place in places:
        if (place / "cute" / "tensor.hpp").is_file():
            return place
    where = f"CUTLASS_PATH is {named}, which has none" if named else "nvidia-cutlass has none"
    where = where if places else "nvidia-cutlass is not installed"
    raise NativeBuildError(
        f"no CUTLASS headers (cute/tensor.hpp): {where}; {INSTALL_CUTLASS}, or set CUTLASS_PATH"
    )


def wanted_archs(toolkit: Toolkit) -> list[str]:
    """The architectures to build for, as in "8.0" or "9.0a"."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if not asked:
        return [arch for arch in DEFAULT_ARCHS if _number(arch) in toolkit.archs]
    archs: list[str] = []
    for entry in asked:
        arch = entry.removesuffix("+PTX")  # the PTX is always embedded
        if not re.fullmatch(r"\d+\.\d[a-z]?", arch):
            raise NativeBuildError(
                f'TORCH_CUDA_ARCH_LIST has {entry!r}; expected numbers, as in "8.0 9.0a"'
            )
        if _number(arch) < OLDEST_ARCH:
            print(f"loraxs_kernels: {arch} of TORCH_CUDA_ARCH_LIST is left out: needs 8.0")
        elif _number(arch) not in toolkit.archs:
            raise NativeBuildError(f"{toolkit.name} does not know {arch} of TORCH_CUDA_ARCH_LIST")
        elif arch not in archs:
            archs.append(arch)
    if not archs:
        raise NativeBuildError(
            f"TORCH_CUDA_ARCH_LIST ({' '.join(asked)}) has no architecture from 8.0 on"
        )
    return archs


def _number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def gencode(virtual: str, archs: list[str]) -> list[str]:
    """nvcc's arguments: PTX for ``virtual``, which is embedded, and machine code for ``archs``.

    Making the PTX takes most of the time, up to a minute and 3 GB for each.
    """
    compute = f"compute_{virtual.replace('.', '')}"
    codes = [f"sm_{arch.replace('.', '')}" for arch in archs]
    return ["-gencode", f"arch={compute},code=[{','.join([*codes, compute])}]"]


def build_cuda(extension: Extension, target: Path) -> str:
    """Compiles and links csrc/cuda into ``target``; returns a line that says with what."""
    if not sys.platform.startswith("linux"):
        raise NativeBuildError(f"the CUDA library is built on Linux, not {sys.platform}")
    torch = find_torch()
    if torch.cuda is None:
        raise NativeBuildError(
            f"torch {torch.version} is not a CUDA build (torch.version.cuda is None); install one "
            "that is, and then the package again"
        )
    toolkit = find_toolkit()
    check_torch(torch, toolkit)
    cutlass, archs, work = find_cutlass(), wanted_archs(toolkit), work_folder("cuda")
    cxx = find_cxx(work)
    include = ["-I", str(ROOT / "csrc"), "-isystem"]
    host = [
        *cxx, *COMPILE_FLAGS, *include, str(torch.include), "-isystem", str(toolkit.include),
        "-DUSE_CUDA", f'-DLORAXS_CUDA_ARCHS="{" ".join(archs)}"',
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]  # fmt: skip
    device = [str(toolkit.nvcc), *NVCC_FLAGS, *include, str(cutlass)]
    if os.environ.get("CXX"):
        device += ["-ccbin", cxx[0]]
    jobs = []
    for source in map(Path, extension.sources):
        only = FOLDER_ARCH.get(source.parent.name)
        chosen = [arch for arch in archs if only in (None, arch)]
        if source.suffix == ".cpp":
            jobs.append((host, ROOT / source))
        elif chosen:
            jobs.append(([*device, *gencode(only or GENERIC_ARCH, chosen)], ROOT / source))
    # The long ones first.
    jobs.sort(key=lambda job: (job[1].suffix != ".cu", job[1]))
    key = f"{version_line(cxx)} {toolkit.name} {torch.version}"
    objects = compile_all(jobs, key, work)
    # The runtime is linked in, so that no particular libcudart has to be there; libcuda is not
    # linked, so that the library loads without a driver.
    libraries = [f"-L{torch.lib}", "-ltorch_cpu", "-ltorch_cuda", str(toolkit.cudart),
                 "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]  # fmt: skip
    link(cxx, target, [*objects, *libraries])
    return f"{toolkit.name} for {' '.join(archs)}, torch {torch.version}"
