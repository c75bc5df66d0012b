"""Flags: small device buffers that are zero whenever no launch is using them.

One buffer per device and stream: launches on one stream follow each other, and each leaves its
flags zeroed. A CUDA graph that is being captured gets a buffer of its own, from its own memory pool
and zeroed by a node of its own, because it may be replayed on any stream beside eager work.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

_LEAST = 4096

_by_stream: dict[tuple[int, int], Tensor] = {}
_by_capture: dict[tuple[int, int, int], Tensor] = {}
_bad_ids: dict[int, Tensor] = {}


def flags(device: torch.device, count: int) -> Tensor:
    """At least ``count`` zeros (int32) for a launch on ``device``'s current stream."""
    if device.type == "cpu":
        return _grown(_by_stream, (-1, 0), device, count)
    index = device.index if device.index is not None else torch.cuda.current_device()
    stream = torch.cuda.current_stream(index).cuda_stream
    if not torch.cuda.is_current_stream_capturing():
        _by_capture.clear()
        return _grown(_by_stream, (index, stream), device, count)
    capture = _capture_id(stream)
    if capture is None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    return _grown(_by_capture, (index, stream, capture), device, count)


def _grown(store: dict, key: tuple[int, ...], device: torch.device, count: int) -> Tensor:
    held = store.get(key)
    if held is None or held.numel() < count:
        size = max(_LEAST, 1 << (count - 1).bit_length())
        held = store[key] = torch.zeros(size, dtype=torch.int32, device=device)
    return held


@functools.cache
def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _capture_id(stream: int) -> int | None:
    """The id of the capture that ``stream`` takes part in; ``None`` if the driver does not tell."""
    driver = _driver()
    if driver is None or not hasattr(driver, "cuStreamGetCaptureInfo_v2"):
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    failed = driver.cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    return None if failed or status.value != 1 else number.value


def bad_ids(device: torch.device) -> Tensor:
    """The flag that a kernel sets when it meets an adapter id out of range.

    It lies in pinned host memory, which the GPU can write and the host can read without waiting.
    """
    index = -1 if device.type == "cpu" else (device.index or 0)
    flag = _bad_ids.get(index)
    if flag is None:
        flag = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        _bad_ids[index] = flag
    return flag


def raise_bad_ids() -> None:
    """Raise if a kernel that has finished met an adapter id out of range; once for each time.

    Raises:
        ValueError: naming ``adapter_ids``. The rows concerned were computed without an adapter.
    """
    for flag in _bad_ids.values():
        if flag[0]:
            flag.zero_()
            raise ValueError(
                "adapter_ids: an earlier call on the GPU got an id that is neither -1 (base only) "
                "nor the number of an adapter in R; those rows were computed without an adapter"
            )
