"""Builds the optional compiled libraries; everything else is declared in pyproject.toml.

``loraxs_kernels/_cpu.abi3.so`` is made from ``csrc/cpu`` (``setup_native.py``),
``loraxs_kernels/_cuda.abi3.so`` from ``csrc/cuda`` (``setup_cuda.py``): two, because what needs
libtorch_cuda does not load beside a CPU build of torch. They use libtorch's stable ABI and no
Python API, so one build serves every Python and every torch from 2.11 on;
``torch.ops.load_library`` loads them.

The package is complete without them. Where one cannot be built, the reason is printed and recorded
in ``loraxs_kernels/_native.json`` (pip hides what a build prints), and the package is installed
without it.

``LORAXS_BUILD_CPU=1`` and ``LORAXS_BUILD_CUDA=1`` make a failure an error, ``=0`` does not try.
``CXX``, ``CXXFLAGS``, ``LDFLAGS`` and ``MAX_JOBS`` are obeyed, for the CUDA library also
``CUDA_HOME``, ``CUTLASS_PATH`` and ``TORCH_CUDA_ARCH_LIST``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a build backend does not

from setup_cuda import build_cuda
from setup_native import PACKAGE, ROOT, NativeBuildError, build_cpu

# What builds each library, by the last part of its name. LORAXS_BUILD_<NAME> switches it.
BUILDERS = {"cpu": build_cpu, "cuda": build_cuda}


def switch(name: str) -> str:
    """LORAXS_BUILD_<NAME>: "1" (must), "0" (do not) or "" (if possible)."""
    variable = f"LORAXS_BUILD_{name.upper()}"
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise NativeBuildError(f"{variable} is {value!r}; expected 1, 0 or nothing")
    return value


class BuildNative(build_ext):
    """Builds each library by its own function; leaves out what cannot be built, and says so."""

    def run(self) -> None:
        self.in_place = bool(self.inplace)
        super().run()

    def build_extensions(self) -> None:
        record = {}
        for extension in list(self.extensions):
            name = extension.name.rpartition("_")[2]
            wanted = switch(name)
            target = Path(self.build_lib, self.get_ext_filename(extension.name))
            try:
                if wanted == "0":
                    raise NativeBuildError(f"LORAXS_BUILD_{name.upper()}=0")
                record[name] = {"built": True, "detail": BUILDERS[name](extension, target)}
            except NativeBuildError as error:
                reason = f"the compiled {name} library is not built: {error}"
                if wanted == "1":
                    raise NativeBuildError(
                        f"LORAXS_BUILD_{name.upper()}=1, but {reason}"
                    ) from error
                self.leave_out(extension, target)
                record[name] = {"built": False, "detail": str(error)}
                print(f"{PACKAGE}: {reason}. Installing without it.", file=sys.stderr)
        self.write_record(record)

    def leave_out(self, extension: Extension, target: Path) -> None:
        """Forgets the library, and deletes what an earlier build left in its place."""
        self.extensions.remove(extension)
        places = [target, ROOT / PACKAGE / target.name] if self.in_place else [target]
        for place in places:
            place.unlink(missing_ok=True)

    def write_record(self, record: dict[str, dict[str, object]]) -> None:
        text = json.dumps(record, indent=2) + "\n"
        places = [Path(self.build_lib, PACKAGE)]
        if self.in_place:
            places.append(ROOT / PACKAGE)
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            (place / "_native.json").write_text(text, encoding="utf-8")


def library(name: str) -> Extension:
    """``_name``, from all that lies in ``csrc/name``."""
    files = sorted(
        path.relative_to(ROOT)
        for folder in (name, "common")
        for path in ROOT.glob(f"csrc/{folder}/**/*")
        if path.suffix in (".h", ".cpp", ".cuh", ".cu")
    )
    sources = [str(f) for f in files if f.suffix in (".cpp", ".cu")]
    headers = [str(f) for f in files if f.suffix in (".h", ".cuh")]
    return Extension(f"{PACKAGE}._{name}", sources, depends=headers, py_limited_api=True)


setup(
    ext_modules=[library(name) for name in BUILDERS if (ROOT / "csrc" / name).is_dir()],
    cmdclass={"build_ext": BuildNative},
    # The libraries call nothing of Python's, so the wheel fits every Python from the oldest on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
