"""Which versions of PEFT the routes through it were tested with."""

from __future__ import annotations

import peft

#: First and last release (major, minor); each one between was tested too.
OLDEST, NEWEST = (0, 17), (0, 21)


def check(version: str = peft.__version__) -> None:
    """Raise ``ImportError`` unless ``version`` is one that was tested."""
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= numbers <= NEWEST:
        raise ImportError(
            f"peft: version {version} is installed, expected {'.'.join(map(str, OLDEST))} to "
            f"{'.'.join(map(str, NEWEST))}: pip install 'peft>={'.'.join(map(str, OLDEST))},"
            f"<{NEWEST[0]}.{NEWEST[1] + 1}'"
        )
