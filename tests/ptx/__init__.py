"""An interpreter of PTX: executes compiled kernels on the CPU, with checks and counters.

``Module`` parses, ``Memory`` holds buffers between guard zones, ``launch`` runs a kernel and
returns a ``Report``. See docs/ptx-interpreter.md for what is modelled and what is not.
"""

from tests.ptx.counters import Report
from tests.ptx.memory import Buffer, Memory
from tests.ptx.parser import Kernel, Module
from tests.ptx.scheduler import launch

__all__ = ["Buffer", "Kernel", "Memory", "Module", "Report", "launch"]
