"""The machine's multiply-add peak, measured by ``peak.cpp`` in the same run as what it judges.

``python -m bench.peak`` prints it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import common

_SOURCE = Path(__file__).with_name("peak.cpp")
_COMPILERS = ("c++", "g++", "clang++")
# The second is what some compilers for Arm want.
_NATIVE = ("-march=native", "-mcpu=native")


@dataclass
class Peak:
    """GFLOP/s by dtype name, and why a dtype (or all) is missing."""

    gflops: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def merge(self, other: Peak) -> None:
        """Keep the better of two measurements: a disturbed one only ever reads too low."""
        for dtype, value in other.gflops.items():
            self.gflops[dtype] = max(value, self.gflops.get(dtype, 0.0))

    def lines(self) -> list[str]:
        """The result for a reader."""
        found = [f"FMA peak {dtype}: {value:.0f} GFLOP/s" for dtype, value in self.gflops.items()]
        return found + [
            f"FMA peak {dtype}: not measured, {why}" for dtype, why in self.missing.items()
        ]


class Meter:
    """The compiled loop. Compiles once, into a folder that goes with the object.

    Raises:
        RuntimeError: there is no C++ compiler, or none compiles the loop; the message says which.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fma-peak-")
        self._program = Path(self._folder.name) / "peak"
        named = os.environ.get("CXX")
        candidates = [named] if named else list(_COMPILERS)
        found = [c for c in candidates if shutil.which(c)]
        if not found:
            raise RuntimeError(f"no C++ compiler (looked for {', '.join(candidates)})")
        errors = []
        for compiler in found:
            for native in _NATIVE:
                error = self._compile(compiler, native)
                if error is None:
                    return
                errors.append(f"{compiler} {native}: {error}")
        raise RuntimeError("; ".join(errors))

    def _compile(self, compiler: str, native: str) -> str | None:
        flags = ["-O3", native, "-std=c++17", "-ffp-contract=fast", "-pthread"]
        result = subprocess.run(
            [compiler, *flags, str(_SOURCE), "-o", str(self._program)],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode == 0:
            return None
        return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[0]

    def measure(self, threads: int | None = None, samples: int = 24) -> Peak:
        """GFLOP/s with as many threads as PyTorch uses; under a second.

        Raises:
            RuntimeError: the loop did not run.
        """
        threads = torch.get_num_threads() if threads is None else threads
        result = subprocess.run(
            [str(self._program), str(threads), str(samples)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if result.returncode != 0:
            raise RuntimeError(f"the loop ended with status {result.returncode}")
        pairs = (line.split() for line in result.stdout.splitlines())
        peak = Peak({dtype: float(value) for dtype, value in pairs})
        if "bf16" not in peak.gflops:
            peak.missing["bf16"] = "this processor has no bf16 dot product"
        elif "amx_bf16" in common.cpu_flags():
            # Tiles do several times what the vector units do; their share would read above 100 %.
            del peak.gflops["bf16"]
            peak.missing["bf16"] = "this processor has AMX, for which there is no loop"
        return peak


def main() -> None:
    print(common.machine_line())
    try:
        peak = Meter().measure()
    except RuntimeError as error:
        raise SystemExit(f"FMA peak: not measured, {error}") from error
    print("\n".join(peak.lines()))


if __name__ == "__main__":
    main()
