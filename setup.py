"""Builds the optional compiled library; everything else is declared in pyproject.toml.

``loraxs_kernels/_cpu.abi3.so`` is made from ``csrc/cpu``. It uses libtorch's stable ABI and no
Python API, so one build serves every Python and every torch from 2.11 on;
``torch.ops.load_library`` loads it.

The package is complete without it. Where it cannot be built, the reason is printed and recorded in
``loraxs_kernels/_native.json`` (pip hides what a build prints), and pure Python is installed.

``LORAXS_BUILD_CPU=1`` makes a failure an error, ``LORAXS_BUILD_CPU=0`` does not try. ``CXX``,
``CXXFLAGS``, ``LDFLAGS`` and ``MAX_JOBS`` are obeyed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
PACKAGE = "loraxs_kernels"
OBJECTS = ROOT / "build" / "native"
MIN_TORCH = (2, 11)
COMPILE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    # The oldest libtorch whose stable ABI the library may ask for: MIN_TORCH.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
# No -march: the sources choose by the instructions of the machine they run on.


class NativeBuildError(BaseError):
    """A compiled library cannot be built here; the message says why."""


@dataclass(frozen=True)
class Torch:
    """Where the headers and libraries of the installed torch are."""

    version: str
    include: Path
    lib: Path


def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise NativeBuildError(
            "torch is not installed in the environment that builds the package "
            "(install torch first, then use pip install --no-build-isolation)"
        )
    home = Path(spec.submodule_search_locations[0])
    torch = Torch(importlib.metadata.version("torch"), home / "include", home / "lib")
    numbers = re.match(r"(\d+)\.(\d+)", torch.version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MIN_TORCH:
        raise NativeBuildError(f"torch {torch.version} is older than 2.11")
    if not (torch.include / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise NativeBuildError(f"torch {torch.version} at {home} comes without its C++ headers")
    return torch


def run(command: list[str], doing: str, stdin: str | None = None) -> str:
    """Standard output of ``command``; a NativeBuildError with its messages if it fails."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NativeBuildError(f"{doing}: cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        sys.stderr.write(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        raise NativeBuildError(f"{doing}: {command[0]} failed with exit status {done.returncode}")
    if done.stderr:
        sys.stderr.write(done.stderr)
    return done.stdout


def find_cxx(work: Path) -> list[str]:
    """The C++ compiler as a command, tried on a program that needs nothing of ours."""
    if not sys.platform.startswith(("linux", "darwin")):
        raise NativeBuildError(
            f"compiled libraries are built on Linux and macOS, not {sys.platform}"
        )
    asked = shlex.split(os.environ.get("CXX", ""))
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if not asked and found is None:
        raise NativeBuildError("no C++ compiler found (c++, g++, clang++; CXX names another)")
    cxx = asked or [str(found)]
    program = "#include <concepts>\nint main() { return std::integral<int> ? 0 : 1; }\n"
    arguments = ["-std=c++20", "-x", "c++", "-", "-o", str(work / "probe")]
    run([*cxx, *arguments], "trying the C++ compiler on a small C++20 program", stdin=program)
    return cxx


def compile_object(command: list[str], source: Path, key: str, work: Path) -> Path:
    """The object file of ``source``; not compiled again while command, source and key are the same.

    ``key`` stands for what the command does not show: compiler, torch and headers.
    """
    digest = hashlib.sha256(f"{key}{shlex.join(command)}".encode() + source.read_bytes())
    target = work / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        partial = target.with_suffix(".partial.o")
        shown = source.relative_to(ROOT)
        print(f"{PACKAGE}: compiling {shown}", flush=True)
        run([*command, "-c", str(source), "-o", str(partial)], f"compiling {shown}")
        partial.replace(target)
    return target


def build_cpu(extension: Extension, target: Path) -> str:
    """Compiles and links csrc/cpu into ``target``; returns a line that says with what."""
    work = OBJECTS / "cpu"
    work.mkdir(parents=True, exist_ok=True)
    torch = find_torch()
    cxx = find_cxx(work)
    compiler = run([*cxx, "--version"], "asking the C++ compiler for its version").splitlines()[0]
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(torch.include)]
    flags = [*COMPILE_FLAGS, *include, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    headers = b"".join((ROOT / name).read_bytes() for name in sorted(extension.depends))
    key = f"{compiler} {torch.version} {hashlib.sha256(headers).hexdigest()}"
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        results = [
            pool.submit(compile_object, [*cxx, *flags], ROOT / source, key, work)
            for source in extension.sources
        ]
        objects = [str(result.result()) for result in results]
    target.parent.mkdir(parents=True, exist_ok=True)
    link = ["-shared", *objects, f"-L{torch.lib}", "-ltorch_cpu", "-o", str(target)]
    run([*cxx, *link, *shlex.split(os.environ.get("LDFLAGS", ""))], f"linking {target.name}")
    return f"{compiler}, torch {torch.version}"


# What builds each library, by the last part of its name. LORAXS_BUILD_<NAME> switches it.
BUILDERS = {"cpu": build_cpu}


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
                print(f"{PACKAGE}: {reason}. Installing pure Python.", file=sys.stderr)
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


def native_libraries() -> list[Extension]:
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h*"))
    if not sources:
        return []
    return [Extension(f"{PACKAGE}._cpu", sources, depends=headers, py_limited_api=True)]


setup(
    ext_modules=native_libraries(),
    cmdclass={"build_ext": BuildNative},
    # The library calls nothing of Python's, so the wheel fits every Python from the oldest on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
