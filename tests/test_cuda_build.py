"""What setup.py finds of a CUDA toolkit, torch and CUTLASS, and what it says is missing.

Toolkits are faked: shell scripts that answer as nvcc does. Nothing is compiled here.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "setup_cuda.py").is_file():
    pytest.skip("no setup.py beside the tests", allow_module_level=True)


def _module(name: str) -> Any:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


pytest.importorskip("setuptools")
native = _module("setup_native")
cuda = _module("setup_cuda")

ARCHS = (75, 80, 86, 89, 90, 100, 120)


def _toolkit(folder: Path, release: str = "13.0", archs: tuple[int, ...] = ARCHS) -> Path:
    """A folder that looks like a toolkit to setup_cuda."""
    listed = "\\n".join(f"compute_{a}" for a in archs)
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V1";;\n'
        f'--list-gpu-arch) printf "{listed}\\n";;\n'
        f'--dryrun) echo "#$ TOP={folder}/bin/.." >&2;; esac\n'
    )
    nvcc.chmod(0o755)
    for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (folder / name).parent.mkdir()
        (folder / name).touch()
    return folder


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable that setup_cuda reads is set, and PATH has the system's own programs only."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CUTLASS_PATH", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return monkeypatch


def test_the_toolkit_of_cuda_home(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain.setenv("CUDA_HOME", str(_toolkit(tmp_path / "cuda", "12.8")))
    found = cuda.find_toolkit()
    assert found.version == (12, 8) and found.archs == set(ARCHS) and found.name == "nvcc 12.8"
    assert found.include == tmp_path / "cuda/include"
    assert found.cudart == tmp_path / "cuda/lib64/libcudart_static.a"


def test_the_toolkit_of_a_script_on_path(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is on PATH may lie elsewhere: nvcc itself says where the toolkit is."""
    home = _toolkit(tmp_path / "cuda")
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    plain.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    found = cuda.find_toolkit()
    assert found.nvcc == script and found.include == home / "include"


def test_a_folder_by_target(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = _toolkit(tmp_path / "cuda")
    place = home / "targets" / "x86_64-linux"
    place.mkdir(parents=True)
    (home / "include").rename(place / "include")
    (home / "lib64").rename(place / "lib")
    plain.setenv("CUDA_HOME", str(home))
    found = cuda.find_toolkit()
    assert found.include == place / "include"
    assert found.cudart == place / "lib/libcudart_static.a"


def test_no_toolkit(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain.setenv("PATH", str(tmp_path))
    with pytest.raises(native.NativeBuildError, match="no CUDA toolkit found: nvcc is not on PATH"):
        cuda.find_toolkit()
    plain.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(native.NativeBuildError, match=f"CUDA_HOME is {tmp_path}, but there is no"):
        cuda.find_toolkit()


def test_a_toolkit_that_is_too_old(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain.setenv("CUDA_HOME", str(_toolkit(tmp_path / "cuda", "11.8")))
    with pytest.raises(native.NativeBuildError, match=r"CUDA 11\.8, which is too old.*12\.0"):
        cuda.find_toolkit()


@pytest.mark.parametrize("name", ["include/cuda_runtime.h", "lib64/libcudart_static.a"])
def test_a_toolkit_without_development_files(
    plain: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    home = _toolkit(tmp_path / "cuda")
    (home / name).unlink()
    plain.setenv("CUDA_HOME", str(home))
    with pytest.raises(native.NativeBuildError, match=f"has no {name}"):
        cuda.find_toolkit()


@pytest.fixture
def toolkit(plain: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    plain.setenv("CUDA_HOME", str(_toolkit(tmp_path / "cuda")))
    return cuda.find_toolkit()


def test_torch_and_toolkit_of_different_majors(toolkit: Any) -> None:
    torch = native.Torch("2.14.1+cu128", Path(), Path(), "12.8")
    with pytest.raises(native.NativeBuildError, match=r"CUDA 12\.8, but .* 13\.0.*toolkit 12\.x"):
        cuda.check_torch(torch, toolkit)
    cuda.check_torch(replace(torch, cuda="13.2"), toolkit)


def test_a_cpu_build_of_torch(plain: pytest.MonkeyPatch) -> None:
    plain.setattr(cuda, "find_torch", lambda: native.Torch("2.13.0+cpu", Path(), Path(), None))
    with pytest.raises(native.NativeBuildError, match=r"torch 2\.13\.0\+cpu is not a CUDA build"):
        cuda.build_cuda(None, Path())


def test_the_cuda_version_of_the_installed_torch() -> None:
    import torch

    assert native.find_torch().cuda == torch.version.cuda


def test_architectures(toolkit: Any, plain: pytest.MonkeyPatch) -> None:
    assert cuda.wanted_archs(toolkit) == ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"]
    assert cuda.wanted_archs(replace(toolkit, archs=frozenset((80, 90)))) == ["8.0", "9.0a"]
    plain.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0,8.0 9.0a+PTX")
    assert cuda.wanted_archs(toolkit) == ["8.0", "9.0a"]
    assert cuda.gencode("8.0", ["8.0", "9.0a"]) == [
        "-gencode", "arch=compute_80,code=[sm_80,sm_90a,compute_80]"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("Ampere", "has 'Ampere'; expected numbers"),
        ("7.0 7.5", r"\(7\.0 7\.5\) has no architecture from 8\.0 on"),
        ("8.0 12.1", r"nvcc 13\.0 does not know 12\.1"),
    ],
)
def test_bad_architectures(toolkit: Any, plain: pytest.MonkeyPatch, asked: str, said: str) -> None:
    plain.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(native.NativeBuildError, match=said):
        cuda.wanted_archs(toolkit)


def test_cutlass_headers(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    missing = "nvidia-cutlass is not installed; pip install --no-deps nvidia-cutlass"
    with pytest.raises(native.NativeBuildError, match=missing):
        cuda.find_cutlass()
    plain.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(native.NativeBuildError, match=f"CUTLASS_PATH is {tmp_path}"):
        cuda.find_cutlass()
    header = tmp_path / "include" / "cute" / "tensor.hpp"
    header.parent.mkdir(parents=True)
    header.touch()
    assert cuda.find_cutlass() == tmp_path / "include"


def test_a_source_is_compiled_again_when_a_header_changes(
    plain: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain.setattr(native, "ROOT", tmp_path)
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "a.cu").write_text('#include "b.cuh"\n')
    (folder / "b.cuh").write_text('#include <vector>\n#include "cuda/c.h"\n')
    (folder / "c.h").write_text("one")
    assert native.own_headers(folder / "a.cu") == {folder / "b.cuh", folder / "c.h"}
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; echo > "$2"\n')
    compiler.chmod(0o755)

    def build(key: str = "k") -> Path:
        found: Path = native.compile_object([str(compiler)], folder / "a.cu", key, tmp_path)
        return found

    first = build()
    assert first.exists() and build() == first and build("other") != first
    (folder / "c.h").write_text("two")
    assert build() != first


def test_files_of_one_architecture(toolkit: Any, plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """csrc/cuda/sm90 is compiled for 9.0a alone, and left out of a build without it."""
    commands: list[list[str]] = []
    torch = native.Torch("2.14.1", tmp_path, tmp_path, "13.0")
    plain.setattr(cuda, "find_torch", lambda: torch)
    plain.setattr(cuda, "find_cutlass", lambda: tmp_path)
    plain.setattr(cuda, "find_cxx", lambda work: ["c++"])
    plain.setattr(cuda, "work_folder", lambda name: tmp_path)
    plain.setattr(cuda, "version_line", lambda cxx: "c++ 12")
    plain.setattr(cuda, "link", lambda cxx, target, arguments: None)

    def compile_all(jobs: Any, key: str, work: Path) -> list[str]:
        commands[:] = [[*command, str(source)] for command, source in jobs]
        return []

    plain.setattr(cuda, "compile_all", compile_all)

    class Extension:
        sources = ("csrc/cuda/ops.cpp", "csrc/cuda/sm80/a.cu", "csrc/cuda/sm90/b.cu")

    plain.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a")
    assert cuda.build_cuda(Extension, tmp_path) == "nvcc 13.0 for 8.0 9.0a, torch 2.14.1"
    by_name = {Path(command[-1]).name: " ".join(command) for command in commands}
    assert "arch=compute_80,code=[sm_80,sm_90a,compute_80]" in by_name["a.cu"]
    assert "arch=compute_90a,code=[sm_90a,compute_90a]" in by_name["b.cu"]
    assert '-DLORAXS_CUDA_ARCHS="8.0 9.0a"' in by_name["ops.cpp"]
    plain.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    cuda.build_cuda(Extension, tmp_path)
    assert [Path(command[-1]).name for command in commands] == ["a.cu", "ops.cpp"]
