"""What building a compiled library takes, and how the CPU library is built; see setup.py."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension
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
    """Where the headers and libraries of the installed torch are.

    ``cuda``: the CUDA version it was built with, ``None`` for a CPU build.
    """

    version: str
    include: Path
    lib: Path
    cuda: str | None = None


def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise NativeBuildError(
            "torch is not installed in the environment that builds the package "
            "(install torch first, then use pip install --no-build-isolation)"
        )
    home = Path(spec.submodule_search_locations[0])
    # Read, not imported: importing torch takes seconds.
    cuda = re.search(r"^cuda\b.*?=\s*'([\d.]+)'", (home / "version.py").read_text(), re.MULTILINE)
    torch = Torch(
        importlib.metadata.version("torch"), home / "include", home / "lib", cuda and cuda[1]
    )
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


def own_headers(source: Path) -> set[Path]:
    """The files of csrc that ``source`` includes, directly or not."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        file = waiting.pop()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE):
            places = [file.parent / name, ROOT / "csrc" / name]
            header = next((p.resolve() for p in places if p.is_file()), None)
            if header is not None and header not in found:
                found.add(header)
                waiting.append(header)
    return found


def compile_object(command: list[str], source: Path, key: str, work: Path) -> Path:
    """The object file of ``source``; not compiled again while command, sources and key are the
    same.

    ``key`` stands for what the command does not show: versions of compiler and torch.
    """
    digest = hashlib.sha256(f"{key}{shlex.join(command)}".encode())
    for file in [source, *sorted(own_headers(source))]:
        digest.update(file.read_bytes())
    target = work / f"{source.parent.name}-{source.stem}-{digest.hexdigest()[:16]}.o"
    if not target.exists():
        partial = target.with_suffix(".partial.o")
        shown = source.relative_to(ROOT)
        print(f"{PACKAGE}: compiling {shown}", flush=True)
        run([*command, "-c", str(source), "-o", str(partial)], f"compiling {shown}")
        partial.replace(target)
    return target


def compile_all(jobs: list[tuple[list[str], Path]], key: str, work: Path) -> list[str]:
    """The objects of ``(command, source)`` pairs, MAX_JOBS at a time (default: one per core)."""
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        results = [
            pool.submit(compile_object, command, source, key, work) for command, source in jobs
        ]
        return [str(result.result()) for result in results]


def version_line(compiler: list[str]) -> str:
    return run([*compiler, "--version"], "asking the C++ compiler for its version").splitlines()[0]


def link(cxx: list[str], target: Path, arguments: list[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*cxx, "-shared", *arguments, "-o", str(target)]
    run([*command, *shlex.split(os.environ.get("LDFLAGS", ""))], f"linking {target.name}")


def work_folder(name: str) -> Path:
    work = OBJECTS / name
    work.mkdir(parents=True, exist_ok=True)
    return work


def build_cpu(extension: Extension, target: Path) -> str:
    """Compiles and links csrc/cpu into ``target``; returns a line that says with what."""
    work = work_folder("cpu")
    torch = find_torch()
    cxx = find_cxx(work)
    compiler = version_line(cxx)
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(torch.include)]
    flags = [*COMPILE_FLAGS, *include, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    jobs = [([*cxx, *flags], ROOT / source) for source in extension.sources]
    objects = compile_all(jobs, f"{compiler} {torch.version}", work)
    link(cxx, target, [*objects, f"-L{torch.lib}", "-ltorch_cpu"])
    return f"{compiler}, torch {torch.version}"
