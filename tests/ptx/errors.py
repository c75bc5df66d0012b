"""What the interpreter raises. Every fault of a kernel has a type of its own."""

from __future__ import annotations


class PtxError(Exception):
    """A fault; ``line`` is the line of the PTX text, ``thread`` the linear thread of the CTA."""

    def __init__(self, what: str, *, thread: int | None = None, address: int | None = None):
        super().__init__(what)
        self.what = what
        self.thread = thread
        self.address = address
        self.line: int | None = None
        self.where = ""

    def locate(self, line: int, where: str) -> None:
        """Fill in the place; the innermost place wins."""
        if self.line is None:
            self.line, self.where = line, where

    def __str__(self) -> str:
        parts = [self.what]
        if self.thread is not None:
            parts.append(f"thread {self.thread}")
        if self.address is not None:
            parts.append(f"address {self.address:#x}")
        if self.line is not None:
            parts.append(f"PTX line {self.line}: {self.where}")
        return "; ".join(parts)


class ParseError(PtxError):
    """The text is not PTX as this parser knows it."""


class UnknownInstruction(PtxError):
    """An instruction, modifier or operand form without a meaning here."""


class ArgumentError(PtxError):
    """A launch that does not fit the kernel's signature."""


class OutOfBounds(PtxError):
    """An access that leaves its buffer or the shared memory."""


class NotWritable(PtxError):
    """A store into a buffer that was declared read-only."""


class Misaligned(PtxError):
    """An address that is not a multiple of the access's size."""


class UninitialisedRegister(PtxError):
    """A register read before anything was written to it."""


class UninitialisedShared(PtxError):
    """Shared memory read before anything was written to it."""


class SharedRace(PtxError):
    """Two warps touch a shared word, at least one writes, and no barrier orders them."""


class GlobalRace(PtxError):
    """Two warps touch a global word, at least one writes, and no release/acquire orders them."""


class AsyncCopyHazard(PtxError):
    """Shared memory touched while an asynchronous copy into it has not been waited for."""


class WgmmaHazard(PtxError):
    """An operand of a running wgmma touched, or a wgmma issued without its fence."""


class MissingProxyFence(PtxError):
    """The asynchronous proxy reads what ordinary stores wrote, with no fence.proxy.async."""


class BarrierMisuse(PtxError):
    """A barrier or mbarrier used against its rules."""


class RemoteShared(PtxError):
    """Shared memory of another CTA of the cluster touched while that CTA may not have started, or
    may have exited."""


class DivergentWarp(PtxError):
    """A warp-wide instruction that part of the warp never reaches."""


class Deadlock(PtxError):
    """No resident CTA can make progress."""


class Trap(PtxError):
    """The kernel executed ``trap`` or a failed assertion."""
