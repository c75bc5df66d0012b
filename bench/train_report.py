"""What ``bench_train`` says: tables for a terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import generation, tables
from bench.train_methods import EAGER, METHODS

BEGIN, END = "<!-- bench-train: begin -->", "<!-- bench-train: end -->"

TITLES = {
    "minilm": "MiniLM-L6, 16 × 32 tokens, 36 layers adapted",
    "smollm2": "SmolLM2-135M, 4 × 128 tokens, 210 layers adapted",
}
KINDS = {"kept": "activations kept", "recomputed": "activation checkpointing"}
TRAIN = ("", "tokens/s", "ms/step", "× eager", "peak memory, MiB", "of eager's")
SIZES = (
    "", "trained numbers", "adapter, KiB", "optimizer, KiB", "frozen bases, MiB", "start-up, s",
    "its peak, MiB",
)  # fmt: skip
GENERATION = ("adapters", "first token, ms", "each further, ms", "× base", "× base, further")

Results = Mapping[str, Mapping[str, Any]]
Table = tuple[str, tuple[str, ...], list[list[str]]]


def _mib(value: float) -> str:
    return f"{value / 2**20:.0f}"


def _train(results: Results, model: str, kind: str) -> list[list[str]]:
    timed = results.get(f"train {model} {kind}")
    rows = []
    for method in METHODS:
        memory = results.get(f"memory {model} {method}")
        peer = results.get(f"memory {model} {EAGER}")
        cells = ["-", "-", "-"]
        if timed:
            seconds = timed["timings_s"][method]["median"]
            eager = timed["timings_s"][EAGER]["median"]
            cells = [
                f"{timed['tokens'] / seconds:.0f}", f"{1e3 * seconds:.0f}",
                f"{eager / seconds:.3f}",
            ]  # fmt: skip
        peak = _mib(memory["peak"][kind]) if memory else "-"
        share = f"{memory['peak'][kind] / peer['peak'][kind]:.2f}" if memory and peer else "-"
        rows.append([method, *cells, peak, share])
    return rows


def _sizes(results: Results, model: str) -> list[list[str]]:
    rows = []
    for method in METHODS:
        found = results.get(f"memory {model} {method}")
        if found:
            sizes = found["sizes"]
            rows.append(
                [
                    method, f"{found['trained']:,}", f"{sizes['adapter'] / 1024:.0f}",
                    f"{sizes['optimizer'] / 1024:.0f}", f"{sizes['bases'] / 2**20:.1f}",
                    f"{found['startup_s']:.2f}", _mib(found["startup_peak"]),
                ]
            )  # fmt: skip
    return rows


def _tables(results: Results) -> list[Table]:
    found: list[Table] = []
    for model, title in TITLES.items():
        if not any(f" {model}" in job for job in results):
            continue
        for kind, words in KINDS.items():
            found.append((f"{title}, {words}", TRAIN, _train(results, model, kind)))
        if rows := _sizes(results, model):
            found.append((f"{title}: sizes and start-up", SIZES, rows))
        job = results.get(f"generation {model}")
        if job:
            words = (
                f"Generation, {generation.REQUESTS} requests at once, prompts of "
                f"{generation.PROMPT} tokens, {generation.NEW_TOKENS} new ones"
            )
            found.append((words, GENERATION, generation.rows(job["rows"])))
    return found


def disturbed(result: Mapping[str, Any]) -> bool:
    """Whether others used the processors while this was timed."""
    return "WARNING" in result.get("others", "")


def _warning(results: Results) -> list[str]:
    jobs = [f"{job} ({result['others']})" for job, result in results.items() if disturbed(result)]
    return [f"Disturbed: {'; '.join(jobs)}"] if jobs else []


def text(results: Results) -> str:
    """All tables for a terminal."""
    parts = []
    for title, columns, rows in _tables(results):
        lines = [tables.table_line(line, columns, first=22) for line in (columns, *rows)]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join([*parts, *_warning(results)])


def markdown(results: Results) -> str:
    """All tables for the documentation."""
    parts = [
        f"{title}:\n\n{tables.markdown(columns, rows)}" for title, columns, rows in _tables(results)
    ]
    return "\n\n".join([*parts, *_warning(results)])


def replace_between_markers(path: Path, content: str) -> None:
    """Put ``content`` between the two markers of a file.

    Raises:
        ValueError: the file does not have both, once, in this order.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: expected {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}", encoding="utf-8")
