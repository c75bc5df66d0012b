"""Peak memory, sizes and start-up time of one way to train, in a process of its own (Linux).

    python -m bench.train_memory MODEL METHOD --rank 16

Prints JSON. Memory is the resident set's high-water mark of this process (VmHWM of
/proc/self/status), reset before each phase; what the process held before anything was adapted,
after one forward pass of the bare model, is subtracted. It contains all that a method costs:
activations, gradients, optimizer, bases, packed copies.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import train_methods
from bench.train_methods import EAGER, METHODS
from bench.train_models import SUBJECTS, Subject


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak() -> None:
    """Give freed memory back, and let the high-water mark start from what is left."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _loaded(subject: Subject, batch: dict[str, Tensor]) -> tuple[nn.Module, int]:
    """A fresh model that has run once, so that its weights are in memory; and what is held then."""
    model = subject.build()
    with torch.no_grad():
        subject.loss(model, batch)
    _reset_peak()
    return model, _status("VmRSS")


def measure(name: str, method: str, rank: int) -> dict[str, Any]:
    """Bytes and seconds of one method on one model.

    Returns:
        ``startup_s``, ``startup_peak``; ``peak`` by ``"kept"`` and ``"recomputed"`` (activation
        checkpointing); ``sizes``; ``trained``, the count of numbers. The eager method's start-up
        is that of the official code, with the libraries that it loads.
    """
    subject = SUBJECTS[name]()
    batches = subject.text()
    train_methods.load_library(method)
    model, before = _loaded(subject, batches[0])
    adapted = train_methods.attach(method, subject, model, rank)
    seconds, startup_peak = adapted.seconds, _status("VmHWM") - before
    peaks = {}
    # What is recomputed first: it needs less, and freed memory may stay with the process.
    for phase in ("recomputed", "kept"):
        train_methods.checkpointing(subject, adapted.model, phase == "recomputed")
        adapted.step(batches)  # packs, and makes the optimizer's states
        _reset_peak()
        adapted.step(batches)
        peaks[phase] = _status("VmHWM") - before
    if method == EAGER:
        # At the end, as scikit-learn and its BLAS stay in memory.
        fresh, loaded = _loaded(subject, batches[0])
        seconds = train_methods.official_seconds(subject, fresh, rank)
        startup_peak = _status("VmHWM") - loaded
    return {
        "startup_s": seconds,
        "startup_peak": startup_peak,
        "peak": peaks,
        "sizes": adapted.sizes(),
        "trained": sum(p.numel() for p in adapted.adapter),
        "bare": before,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=SUBJECTS)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        parser.error(f"got {sys.platform}, expected Linux: only it has /proc/self/clear_refs")
    if args.threads:
        torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.model, args.method, args.rank)))


if __name__ == "__main__":
    main()
