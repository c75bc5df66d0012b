"""Transaction barriers and bulk copies of the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ptx import Memory, Module, errors, launch
from tests.ptx.ops.tensormap import encode
from tests.ptx.snippets import HEADER, REGISTERS

SETUP = """
    mov.u32 %r0, %tid.x; setp.eq.u32 %p0, %r0, 0; mov.u32 %r1, smem; add.u32 %r2, %r1, 8192;
    @%p0 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0;
"""
EXPECT = "@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], BYTES;"
ISSUE = """@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
    [%r1], [map, {X, Y}], [%r2];"""
WAIT = "AGAIN: mbarrier.try_wait.parity.shared.b64 %p1, [%r2], 0; @!%p1 bra AGAIN;"
READ = """
    mad.lo.u32 %r4, %r0, 16, %r1; ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4];
    ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r0, 16, %d1;
    st.global.v4.b32 [%d1], {%r5, %r6, %r7, %r8};
"""


def run_map(
    body: str, x: Any, *, swizzle: int = 0, box: tuple[int, int] = (16, 64), threads: int = 128
) -> Any:
    """Run with a map of the 2-D fp16 array x and a result of 2048 bytes."""
    memory = Memory(1 << 22)
    source = memory.buffer(x, "x")
    out = memory.buffer(np.zeros(512, np.int32), "out")
    tensor = encode(source.address, "f16", x.shape[::-1], [x.strides[0]], box, swizzle)
    text = (f"{HEADER}.visible .entry k(.param .align 64 .b8 map[128], .param .u64 out)\n"
            f"{{{REGISTERS} .shared .align 1024 .b8 smem[8200];\n{body}\nret;\n}}\n")  # fmt: skip
    kernel = Module(text).kernels["k"]
    report = launch(kernel, grid=(1,), args=[tensor, out], memory=memory, threads=threads)
    return out.array().view(np.float16), source, report


def values(rows: int, columns: int) -> Any:
    return np.arange(rows * columns, dtype=np.float16).reshape(rows, columns)


def load(x: int, y: int, size: int = 2048, issue: str = ISSUE, expect: str = EXPECT) -> str:
    return (
        SETUP + expect.replace("BYTES", str(size)) + issue.replace("X", str(x)).replace("Y", str(y))
    )


@pytest.mark.parametrize(("x", "y"), [(0, 0), (8, 30), (-8, -3), (40, 0)])
def test_a_box_arrives_with_zeros_outside_the_tensor(x: int, y: int) -> None:
    tensor = values(70, 40)
    got, _, report = run_map(load(x, y) + WAIT + READ, tensor)
    padded = np.zeros((200, 200), np.float16)
    padded[64:134, 64:104] = tensor
    box = padded[64 + y : 128 + y, 64 + x : 80 + x]
    assert np.array_equal(got[:1024].reshape(64, 16), box)
    inside = max(0, min(70, y + 64) - max(0, y)) * max(0, min(40, x + 16) - max(0, x))
    assert report.global_load_bytes == 2 * inside


@pytest.mark.parametrize(("swizzle", "box"), [(32, (16, 64)), (64, (32, 32)), (128, (64, 16))])
def test_swizzled_boxes(swizzle: int, box: tuple[int, int]) -> None:
    tensor = values(64, 64)
    got, _, _ = run_map(load(0, 0) + WAIT + READ, tensor, swizzle=swizzle, box=box)
    chunks = got[:1024].reshape(-1, 8)
    for row in range(box[1]):
        for chunk in range(box[0] // 8):
            line = row * swizzle // 128
            place = row * (swizzle // 16) + (chunk ^ line % (swizzle // 16))
            assert np.array_equal(chunks[place], tensor[row, 8 * chunk : 8 * chunk + 8])


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        (errors.AsyncCopyHazard, load(0, 0) + "bar.sync 0;" + READ),
        (errors.Deadlock, load(0, 0, size=4096) + WAIT + READ),
        (errors.Deadlock, load(0, 0, issue="") + WAIT),
        (errors.BarrierMisuse, load(0, 0).replace("[map, {0, 0}], [%r2]", "[map, {0, 0}], [%r1]")),
        (errors.BarrierMisuse, SETUP + "@%p0 mbarrier.arrive.shared.b64 _, [%r2], 2;"),
        (errors.SharedRace, load(0, 0).replace("bar.sync 0;", "") + WAIT),  # others see no init
        # Only warp 0 waits; the barrier is missing for the others.
        (errors.SharedRace,
         load(0, 0) + "setp.ge.u32 %p2, %r0, 32; @%p2 bra SKIP;" + WAIT + "SKIP:" + READ),
        (errors.Misaligned, load(0, 0).replace("[%r1], [map", "[%r1+64], [map")),
        (errors.AsyncCopyHazard,
         load(0, 0) + "mad.lo.u32 %r4, %r0, 4, %r1; st.shared.b32 [%r4], 0;"),
    ],
)  # fmt: skip
def test_faults_of_loads(fault: type[errors.PtxError], body: str) -> None:
    with pytest.raises(fault):
        run_map(body, values(64, 16))


STORE = """
    mov.u32 %r0, %tid.x; setp.eq.u32 %p0, %r0, 0; mov.u32 %r1, smem; mad.lo.u32 %r4, %r0, 16, %r1;
    mov.b32 %r5, 0x3c003c00; st.shared.v4.b32 [%r4], {%r5, %r5, %r5, %r5};
    FENCE bar.sync 0;
    @%p0 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [map, {8, 60}], [%r1];
    @%p0 cp.async.bulk.commit_group; WAIT
    LATE
"""


def stored(fence: str = "fence.proxy.async.shared::cta;",
           wait: str = "@%p0 cp.async.bulk.wait_group 0;",
           late: str = "bar.sync 0; st.shared.b32 [%r4], 0;") -> Any:  # fmt: skip
    body = STORE.replace("FENCE", fence).replace("WAIT", wait).replace("LATE", late)
    return run_map(body, np.zeros((70, 40), np.float16))


def test_a_box_is_stored_where_it_overlaps_the_tensor() -> None:
    _, source, report = stored()
    want = np.zeros((70, 40))
    want[60:70, 8:24] = 1
    assert np.array_equal(source.array(), want) and np.array_equal(source.write_counts, want)
    assert report.global_store_bytes == 320


def test_faults_of_stores() -> None:
    with pytest.raises(errors.MissingProxyFence):
        stored(fence="")
    with pytest.raises(errors.WgmmaHazard, match="running asynchronous"):
        stored(wait="")
    with pytest.raises(errors.SharedRace):
        stored(late="st.shared.b32 [%r4], 0;")


RING = """
    mov.u32 %r0, %tid.x; mov.u32 %r1, smem; add.u32 %r2, %r1, 8128; add.u32 %r3, %r1, 8136;
    setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p3, %r0, 64;
    @%p0 mbarrier.init.shared.b64 [%r2], 1; @%p0 mbarrier.init.shared.b64 [%r3], 64; bar.sync 0;
    mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r20, 0;
    and.b32 %r6, %r0, 63; mad.lo.u32 %r6, %r6, 4, %r1;
    ld.param.u64 %d1, [out];
    setp.ge.u32 %p1, %r0, 64; @%p1 bra PRODUCER;
    CONSUME:
    F: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], %r11; @!%p2 bra F;
    ld.shared.b32 %r12, [%r6]; add.s32 %r20, %r20, %r12;
    EMPTY
    xor.b32 %r11, %r11, 1; add.s32 %r10, %r10, 1; setp.lt.s32 %p4, %r10, 5; @%p4 bra CONSUME;
    mad.wide.u32 %d2, %r0, 4, %d1; st.global.b32 [%d2], %r20; bra DONE;
    PRODUCER: @!%p3 bra DONE;
    PRODUCE: xor.b32 %r13, %r11, 1;
    E: mbarrier.try_wait.parity.shared.b64 %p2, [%r3], %r13; @!%p2 bra E;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 256;
    mad.wide.u32 %d3, %r10, 256, %d1; add.u64 %d3, %d3, 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d3], 256, [%r2];
    xor.b32 %r11, %r11, 1; add.s32 %r10, %r10, 1; setp.lt.s32 %p4, %r10, 5; @%p4 bra PRODUCE;
    DONE: ret;
"""


def ring(empty: str) -> Any:
    memory = Memory(1 << 22)
    data = np.zeros((6, 64), np.int32)
    data[1:] = np.arange(5)[:, None] * 100 + np.arange(64)
    out = memory.buffer(data, "out")
    code = RING.replace("EMPTY", empty)
    text = (f"{HEADER}.visible .entry k(.param .u64 out)\n{{{REGISTERS}\n"
            f".shared .align 1024 .b8 smem[8192];\n{code}\n}}\n")  # fmt: skip
    launch(Module(text).kernels["k"], grid=(1,), args=[out], memory=memory, threads=96)
    return out.array()


def test_a_producer_warp_and_consumer_warps_share_a_slot() -> None:
    got = ring("mbarrier.arrive.shared.b64 _, [%r3];")
    assert np.array_equal(got[0], 1000 + 5 * np.arange(64))


def test_a_consumer_that_never_hands_the_slot_back() -> None:
    with pytest.raises(errors.Deadlock):
        ring("")
