"""The interpreter's machine: threads, warps, memories, barriers, order, deadlock, counters.

Each check is seen to catch its fault.
"""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest

from tests.ptx import Memory, Module, errors, launch
from tests.ptx.snippets import kernel_text, run

TID = "mov.u32 %r0, %tid.x; mov.u32 %r9, %ctaid.x;"


def pointer(n: int, size: int = 4, index: str = "%r0") -> str:
    """%d<n> = &p<n>[index]."""
    return f"ld.param.u64 %d{n}, [p{n}]; mad.wide.u32 %d{n}, {index}, {size}, %d{n};"


def ints(count: int, fill: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.full(count, fill, np.int32)


# --- control flow


def test_divergent_loops_and_branches_reconverge() -> None:
    # Each thread counts to its number, odd ones twice; then the warp sums by shuffles.
    body = (
        TID
        + pointer(0)
        + """
        mov.b32 %r1, 0; mov.b32 %r2, 0;
        LOOP: setp.ge.u32 %p1, %r2, %r0;
        @%p1 bra OUT;
        and.b32 %r3, %r0, 1; setp.eq.u32 %p2, %r3, 0;
        @%p2 bra EVEN;
        add.s32 %r1, %r1, 2; bra.uni NEXT;
        EVEN: add.s32 %r1, %r1, 1;
        NEXT: add.s32 %r2, %r2, 1; bra LOOP;
        OUT: mov.b32 %r4, %r1;
        shfl.sync.bfly.b32 %r5, %r4, 16, 31, -1; add.s32 %r4, %r4, %r5;
        shfl.sync.bfly.b32 %r5, %r4, 8, 31, -1; add.s32 %r4, %r4, %r5;
        shfl.sync.bfly.b32 %r5, %r4, 4, 31, -1; add.s32 %r4, %r4, %r5;
        shfl.sync.bfly.b32 %r5, %r4, 2, 31, -1; add.s32 %r4, %r4, %r5;
        shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1; add.s32 %r4, %r4, %r5;
        st.global.b32 [%d0], %r4;
    """
    )
    (out,), _ = run(body, [ints(96)], threads=96)
    thread = np.arange(96)
    counted = np.where(thread % 2, 2 * thread, thread)
    assert np.array_equal(out, np.repeat(counted.reshape(3, 32).sum(1), 32))


def test_threads_leave_early_and_partial_warps_have_no_spare_threads() -> None:
    body = (
        TID
        + pointer(0)
        + """
        setp.gt.u32 %p1, %r0, 40; @%p1 ret;
        bar.sync 0;
        st.global.b32 [%d0], 7;
    """
    )
    (out,), _ = run(body, [ints(50)], threads=50)
    assert np.array_equal(out, np.where(np.arange(50) > 40, 0, 7))


def test_scopes_have_their_own_registers_and_labels() -> None:
    inner = """{ .reg .pred again; .reg .b32 n; mov.b32 n, 0;
        WAIT: add.s32 n, n, 1; setp.lt.s32 again, n, 3; @again bra WAIT;
        add.s32 %r1, %r1, n; }"""
    body = TID + pointer(0) + "mov.b32 %r1, 0;" + inner + inner + "st.global.b32 [%d0], %r1;"
    (out,), _ = run(body, [ints(32)])
    assert (out == 6).all()


def test_a_shuffle_that_part_of_the_warp_never_reaches() -> None:
    body = (
        TID
        + """
        setp.lt.u32 %p1, %r0, 16; @%p1 bra HALF;
        bar.sync 0;
        HALF: shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;
    """
    )
    with pytest.raises(errors.DivergentWarp):
        run(body)


@pytest.mark.parametrize(
    ("code", "want"),
    [
        ("shfl.sync.up.b32 %r1|%p1, %r0, 3, 0, -1", lambda t: np.where(t % 32 >= 3, t - 3, t)),
        ("shfl.sync.down.b32 %r1|%p1, %r0, 5, 31, -1", lambda t: np.where(t % 32 < 27, t + 5, t)),
        ("shfl.sync.idx.b32 %r1|%p1, %r0, 9, 31, -1", lambda t: t // 32 * 32 + 9),
        ("shfl.sync.bfly.b32 %r1|%p1, %r0, 6, 6175, -1", lambda t: t ^ 6),
        ("and.b32 %r2, %r0, 1; setp.eq.u32 %p1, %r2, 1; vote.sync.ballot.b32 %r1, %p1, -1",
         lambda t: np.full_like(t, 0xAAAAAAAA)),
        ("setp.lt.u32 %p1, %r0, 40; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2",
         lambda t: t < 64),
        ("setp.lt.u32 %p1, %r0, 40; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2",
         lambda t: t < 32),
        ("redux.sync.add.u32 %r1, %r0, -1", lambda t: t // 32 * 32 * 32 + 496),
        ("elect.sync %r2|%p1, -1; selp.b32 %r1, 1, 0, %p1", lambda t: t % 32 == 0),
    ],
)  # fmt: skip
def test_exchanges_within_a_warp(code: str, want: Any) -> None:
    (out,), _ = run(TID + pointer(0) + code + "; st.global.b32 [%d0], %r1;", [ints(96)], threads=96)
    assert np.array_equal(out.view(np.uint32), want(np.arange(96)).astype(np.uint32))


# --- global memory


def test_vectors_and_widths() -> None:
    x = np.arange(128, dtype=np.int32)
    body = (
        TID
        + pointer(0, 16)
        + pointer(1, 16)
        + """
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0];
        st.global.v2.b32 [%d1+8], {%r2, %r1}; st.global.v2.b32 [%d1], {%r4, %r3};
    """
    )
    (_, out), report = run(body, [x, ints(128)])
    assert np.array_equal(out, x.reshape(-1, 4)[:, ::-1].ravel())
    assert report.load_widths == {16: 32} and report.store_widths == {8: 64}
    assert (report.global_load_bytes, report.load_sectors) == (512, 16)


def test_strided_loads_cost_a_sector_each() -> None:
    _, report = run(TID + pointer(0, 64) + "ld.global.b16 %h1, [%d0];", [ints(512)])
    assert (report.load_sectors, report.global_load_bytes) == (32, 64)


@pytest.mark.parametrize(
    ("code", "fault", "thread"),
    [
        ("ld.global.b32 %r1, [%d0];", errors.OutOfBounds, 30),
        ("st.global.b32 [%d0], 1;", errors.OutOfBounds, 30),
        ("st.global.b32 [%d0+-4], 1;", errors.OutOfBounds, 0),
        ("setp.lt.u32 %p1, %r0, 30; @%p1 ld.global.b32 %r1, [%d0+2];", errors.Misaligned, 0),
        ("setp.eq.u32 %p1, %r0, 1; @%p1 ld.global.v2.b32 {%r1, %r2}, [%d0];", errors.Misaligned, 1),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 st.global.b32 [%d1], 1;", errors.NotWritable, 3),
        ("add.s32 %r1, %r2, 1;", errors.UninitialisedRegister, 0),
        ("setp.lt.u32 %p1, %r0, 5; @%p1 mov.b32 %r2, 0; add.s32 %r1, %r2, 1;",
         errors.UninitialisedRegister, 5),
        ("ld.shared.b32 %r1, [smem];", errors.UninitialisedShared, 0),
        ("mad.lo.u32 %r1, %r0, 4, smem; st.shared.b32 [%r1+4], 1;", errors.OutOfBounds, 31),
        ("mad.lo.u32 %r1, %r0, 4, smem; st.shared.b64 [%r1], 1;", errors.Misaligned, 1),
    ],
)  # fmt: skip
def test_faults_name_the_place(code: str, fault: type[errors.PtxError], thread: int) -> None:
    with pytest.raises(fault) as caught:
        run(
            TID + "\n" + pointer(0) + pointer(1) + "\n" + code,
            [ints(30), ints(32)],
            shared=128,
            readonly=[1],
        )
    assert caught.value.thread == thread
    assert (
        caught.value.line
        == kernel_text(code, 2, 128).count("\n", 0, kernel_text(code, 2, 128).index(code)) + 3
    )
    assert re.search(rf"thread {thread}\b", str(caught.value))


def test_copies_and_selections_hand_on_what_is_not_initialised() -> None:
    run("mov.b32 %r1, %r2; mov.b32 %r3, 1; setp.eq.u32 %p1, %r3, 1; selp.b32 %r4, %r3, %r1, %p1;"
        "add.s32 %r5, %r4, 1;")  # fmt: skip
    with pytest.raises(errors.UninitialisedRegister):
        run("mov.b32 %r1, %r2; add.s32 %r5, %r1, 1;")


def test_every_store_is_counted_on_its_element() -> None:
    body = (
        TID
        + pointer(0)
        + """
        st.global.b32 [%d0], 5; setp.lt.u32 %p1, %r0, 4; @%p1 st.global.b32 [%d0], 6;
    """
    )
    memory = Memory(1 << 22)
    buffer = memory.buffer(ints(40))
    kernel = Module(kernel_text(body, 1)).kernels["k"]
    launch(kernel, grid=(1,), args=[buffer], memory=memory, threads=32)
    assert np.array_equal(buffer.write_counts, [2] * 4 + [1] * 28 + [0] * 8)


def test_threads_that_store_different_values_to_one_place() -> None:
    run(TID + "ld.param.u64 %d0, [p0]; st.global.b32 [%d0], 3;", [ints(1)])
    with pytest.raises(errors.GlobalRace):
        run(TID + "ld.param.u64 %d0, [p0]; st.global.b32 [%d0], %r0;", [ints(1)])


def test_generic_addresses_find_their_space() -> None:
    body = (
        TID
        + pointer(0)
        + """
        mov.u64 %d1, smem; cvta.shared.u64 %d2, %d1; mad.wide.u32 %d2, %r0, 4, %d2;
        add.s32 %r1, %r0, 3; st.b32 [%d2], %r1; bar.sync 0;
        setp.lt.u32 %p1, %r0, 16; selp.b64 %d3, %d0, %d2, %p1; ld.b32 %r2, [%d3];
        cvta.to.shared.u64 %d4, %d2; cvt.u32.u64 %r4, %d4; ld.shared.b32 %r3, [%r4];
        add.s32 %r2, %r2, %r3; st.b32 [%d0], %r2;
    """
    )
    (out,), _ = run(body, [ints(32, 100)], shared=128)
    t = np.arange(32)
    assert np.array_equal(out, np.where(t < 16, 100, t + 3) + t + 3)


def test_local_memory_and_structures_as_parameters() -> None:
    text = """.version 8.8
    .target sm_80
    .address_size 64
    .global .align 4 .b32 table[3] = {10, 20, 30};
    .visible .entry k(.param .align 8 .b8 s[16], .param .u64 out) {
    .local .align 4 .b8 depot[16]; .reg .b64 %d<9>; .reg .b32 %r<9>;
    ld.param.u32 %r1, [s+4]; mov.u32 %r2, %tid.x; mov.u64 %d1, depot; cvta.local.u64 %d2, %d1;
    add.s32 %r3, %r1, %r2; st.b32 [%d2+8], %r3; ld.local.b32 %r4, [%d1+8];
    mov.u64 %d5, table; cvta.global.u64 %d5, %d5; ld.b32 %r5, [%d5+8]; add.s32 %r4, %r4, %r5;
    ld.param.u64 %d3, [out]; mad.wide.u32 %d3, %r2, 4, %d3; st.global.b32 [%d3], %r4; ret; }"""
    memory = Memory(1 << 22)
    out = memory.buffer(ints(32))
    packed = np.array([1, 50, 0, 0], np.int32).tobytes()
    kernel = Module(text).kernels["k"]
    launch(kernel, grid=(1,), args=[packed, out], memory=memory, threads=32)
    assert np.array_equal(out.array(), np.arange(32) + 80)
    with pytest.raises(errors.ArgumentError, match="16 bytes"):
        launch(kernel, grid=(1,), args=[b"", out], memory=memory, threads=32)


# --- shared memory and barriers

EXCHANGE = (
    TID
    + pointer(0)
    + """
    mad.lo.u32 %r1, %r0, 4, smem; st.shared.b32 [%r1], %r0;
    BARRIER
    xor.b32 %r2, %r0, 32; mad.lo.u32 %r2, %r2, 4, smem; ld.shared.b32 %r3, [%r2];
    st.global.b32 [%d0], %r3;
"""
)


def test_a_barrier_orders_warps_and_its_lack_is_a_race() -> None:
    (out,), report = run(
        EXCHANGE.replace("BARRIER", "bar.sync 0;"), [ints(64)], threads=64, shared=256
    )
    assert np.array_equal(out, np.arange(64) ^ 32) and report.barriers == 1
    with pytest.raises(errors.SharedRace, match="read of another warp's write"):
        run(EXCHANGE.replace("BARRIER", ""), [ints(64)], threads=64, shared=256)


def test_overwriting_what_another_warp_read_needs_a_barrier_too() -> None:
    again = EXCHANGE.replace("BARRIER", "bar.sync 0;") + "AGAIN st.shared.b32 [%r1], 0;"
    run(again.replace("AGAIN", "bar.sync 0;"), [ints(64)], threads=64, shared=256)
    with pytest.raises(errors.SharedRace, match="overwrites what another warp read"):
        run(again.replace("AGAIN", ""), [ints(64)], threads=64, shared=256)


def test_a_barrier_of_some_warps_orders_these_alone() -> None:
    # Warps 0 and 1 meet at barrier 1; warps 2 and 3 do not.
    body = (
        TID
        + pointer(0)
        + """
        mad.lo.u32 %r1, %r0, 4, smem; st.shared.b32 [%r1], %r0;
        setp.ge.u32 %p1, %r0, LIMIT; @%p1 bra SKIP; bar.sync 1, COUNT; SKIP:
        xor.b32 %r2, %r0, 32; mad.lo.u32 %r2, %r2, 4, smem;
        setp.lt.u32 %p2, %r0, READERS; @%p2 ld.shared.b32 %r3, [%r2]; @%p2 st.global.b32 [%d0], %r3;
    """
    )
    for limit, readers, fails in (("64", "64", False), ("64", "128", True)):
        code = body.replace("LIMIT", limit).replace("COUNT", limit).replace("READERS", readers)
        if fails:
            with pytest.raises(errors.SharedRace):
                run(code, [ints(128)], threads=128, shared=512)
        else:
            run(code, [ints(128)], threads=128, shared=512)


def test_producer_arrives_and_consumer_waits_at_named_barriers() -> None:
    body = (
        TID
        + pointer(0)
        + """
        and.b32 %r4, %r0, 31; mad.lo.u32 %r1, %r4, 4, smem;
        setp.lt.u32 %p1, %r0, 32; @%p1 bra PRODUCER;
        bar.sync 3, 64; ld.shared.b32 %r2, [%r1]; st.global.b32 [%d0], %r2; bra DONE;
        PRODUCER: st.shared.b32 [%r1], %r0; bar.arrive 3, 64;
        DONE:
    """
    )
    (out,), _ = run(body, [ints(64)], threads=64, shared=128)
    assert np.array_equal(out[32:], np.arange(32))


def test_a_barrier_that_nobody_else_reaches_is_a_deadlock() -> None:
    with pytest.raises(errors.Deadlock, match=r"64 threads at line \d+ \(bar.sync 1, 128\)"):
        run("bar.sync 1, 128;", threads=64)


def test_barrier_reductions() -> None:
    body = (
        TID
        + pointer(0)
        + """
        setp.lt.u32 %p1, %r0, 40; barrier.red.popc.u32 %r1, 0, %p1; st.global.b32 [%d0], %r1;
    """
    )
    (out,), _ = run(body, [ints(64)], threads=64)
    assert (out == 40).all()


# --- cp.async

COPY = (
    TID
    + pointer(0, 16)
    + pointer(1, 16)
    + """
    mad.lo.u32 %r1, %r0, 16, smem; xor.b32 %r2, %r0, 32; mad.lo.u32 %r2, %r2, 16, smem;
    cp.async.cg.shared.global [%r1], [%d0], 16;
    cp.async.commit_group;
    WAIT
    ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2];
    st.global.v4.b32 [%d1], {%r3, %r4, %r5, %r6};
"""
)


def test_asynchronous_copies_need_their_wait_and_then_a_barrier() -> None:
    x = np.arange(256, dtype=np.int32)
    arrays = [x, ints(256)]
    (_, out), report = run(
        COPY.replace("WAIT", "cp.async.wait_group 0; bar.sync 0;"), arrays, threads=64, shared=1024
    )
    assert np.array_equal(out, np.roll(x, 128)) and report.load_widths == {16: 64}
    for wrong, fault in (("bar.sync 0;", errors.AsyncCopyHazard),
                         ("cp.async.wait_group 1; bar.sync 0;", errors.AsyncCopyHazard),
                         ("cp.async.wait_group 0;", errors.SharedRace)):  # fmt: skip
        with pytest.raises(fault):
            run(COPY.replace("WAIT", wrong), arrays, threads=64, shared=1024)
    with pytest.raises(errors.AsyncCopyHazard, match="overwrites"):
        run(COPY.replace("WAIT", "st.shared.b32 [%r1], 0;"), arrays, threads=64, shared=1024)


def test_short_copies_are_filled_with_zeros_and_read_no_further() -> None:
    x = np.arange(64, dtype=np.int32)
    body = (
        TID
        + pointer(0, 16)
        + pointer(1, 16)
        + """
        mad.lo.u32 %r1, %r0, 16, smem; setp.lt.u32 %p1, %r0, 15; selp.b32 %r3, 16, 8, %p1;
        setp.lt.u32 %p2, %r0, 16; selp.b32 %r3, %r3, 0, %p2;
        cp.async.cg.shared.global [%r1], [%d0], 16, %r3; cp.async.wait_all;
        ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r1]; st.global.v4.b32 [%d1], {%r3, %r4, %r5, %r6};
    """
    )
    (_, out), report = run(body, [x[:62], ints(128)], shared=512)
    assert np.array_equal(out[:62], x[:62]) and not out[62:].any()
    assert report.load_widths == {16: 15, 8: 1} and report.global_load_bytes == 248


def test_groups_land_in_order() -> None:
    x = np.arange(256, dtype=np.int32)
    body = (
        TID
        + pointer(0, 16)
        + pointer(1, 16)
        + """
        mad.lo.u32 %r1, %r0, 16, smem;
        cp.async.cg.shared.global [%r1], [%d0], 16; cp.async.commit_group;
        cp.async.cg.shared.global [%r1+512], [%d0+512], 16; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.b32 %r3, [%r1]; LATER
        st.global.b32 [%d1], %r3;
    """
    )
    run(body.replace("LATER", ""), [x, ints(128)], shared=1024)
    with pytest.raises(errors.AsyncCopyHazard):
        run(body.replace("LATER", "ld.shared.b32 %r4, [%r1+512];"), [x, ints(128)], shared=1024)


# --- atomics, order between CTAs, deadlock


def test_atomics_return_what_was_there_once_each() -> None:
    body = (
        TID
        + """
        ld.param.u64 %d0, [p0]; atom.global.add.u32 %r1, [%d0], 2;
        ld.param.u64 %d1, [p1]; mad.lo.u32 %r2, %r9, 64, %r0; mad.wide.u32 %d1, %r2, 4, %d1;
        st.global.b32 [%d1], %r1; red.global.max.s32 [%d0+4], %r2;
        atom.global.cas.b32 %r4, [%d0+8], 0, %r2; atom.global.exch.b32 %r5, [%d0+12], %r2;
    """
    )
    (counter, old), report = run(body, [ints(4), ints(192)], threads=64, grid=3)
    assert (
        np.array_equal(np.sort(old), 2 * np.arange(192)) and counter[0] == 384 and counter[1] == 191
    )
    assert report.atomics == 4 * 192


def test_float_atomics_and_shared_atomics() -> None:
    body = (
        TID
        + """
        setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [smem], 0; bar.sync 0;
        cvt.rn.f32.u32 %f1, %r0; atom.shared.add.f32 %f2, [smem], %f1; bar.sync 0;
        ld.param.u64 %d0, [p0]; ld.shared.f32 %f3, [smem]; @%p1 red.global.add.f32 [%d0], %f3;
        @%p1 atom.global.add.v2.f32 {%f4, %f5}, [%d0+8], {%f3, %f3};
    """
    )
    (out,), _ = run(body, [np.ones(4, np.float32)], threads=64, grid=2, shared=16)
    assert out.tolist() == [1 + 2 * 2016, 1, 1 + 2 * 2016, 1 + 2 * 2016]


# CTA 0 publishes what all its warps stored; the others wait for the flag and read it.
PUBLISH = (
    TID
    + pointer(0)
    + pointer(2, 4, "%r0")
    + """
    ld.param.u64 %d1, [p1]; setp.ne.u32 %p9, %r0, 0;
    setp.ne.u32 %p1, %r9, 0; @%p1 bra CONSUMER;
    add.s32 %r1, %r0, 5; st.global.b32 [%d0], %r1;
    BEFORE
    @%p9 bra DONE; RELEASE bra DONE;
    CONSUMER: @%p9 bra MEET;
    SPIN: ACQUIRE setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN;
    MEET: AFTER ld.global.b32 %r3, [%d0]; st.global.b32 [%d2], %r3;
    DONE:
"""
)
GOOD = {"BEFORE": "bar.sync 0;", "RELEASE": "st.release.gpu.global.b32 [%d1], 1;",
            "ACQUIRE": "ld.acquire.gpu.global.b32 %r2, [%d1];", "AFTER": "bar.sync 0;"}  # fmt: skip
WAYS = {
    "release and acquire": {},
    "atomics": {"RELEASE": "atom.global.gpu.release.exch.b32 %r4, [%d1], 1;",
                    "ACQUIRE": "atom.global.gpu.acquire.add.u32 %r2, [%d1], 0;"},
    "fences": {"RELEASE": "membar.gl; st.volatile.global.b32 [%d1], 1;",
                   "ACQUIRE": "ld.volatile.global.b32 %r2, [%d1];",
                   "AFTER": "fence.acq_rel.gpu; bar.sync 0;"},
}  # fmt: skip
FAULTS = {
    "no barrier before the release": {"BEFORE": ""},
    "no barrier after the acquire": {"AFTER": ""},
    "a relaxed release": {"RELEASE": "st.relaxed.gpu.global.b32 [%d1], 1;"},
    "a relaxed acquire": {"ACQUIRE": "ld.relaxed.gpu.global.b32 %r2, [%d1];"},
    "a release for the CTA alone": {"RELEASE": "st.release.cta.global.b32 [%d1], 1;"},
    "an atomic without order": {"RELEASE": "atom.global.gpu.relaxed.exch.b32 %r4, [%d1], 1;"},
    "a volatile store without fence": {"RELEASE": "st.volatile.global.b32 [%d1], 1;"},
}


def publish(changes: dict[str, str], **options: Any) -> Any:
    body = PUBLISH
    for name, code in {**GOOD, **changes}.items():
        body = body.replace(name, code)
    return run(body, [ints(64), ints(1), ints(64)], threads=64, grid=2, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ["linear", "reversed", "random"])
def test_publishing_between_ctas(way: str, order: str) -> None:
    chosen = random.Random(5) if order == "random" else order
    (_, _, out), _ = publish(WAYS[way], order=chosen)
    assert np.array_equal(out, np.arange(64) + 5)


@pytest.mark.parametrize("fault", FAULTS)
def test_publishing_with_a_gap_in_the_order_is_a_race(fault: str) -> None:
    with pytest.raises(
        errors.GlobalRace, match="read is not ordered after another warp's write of p0"
    ):
        publish(FAULTS[fault])


def test_waiting_for_a_cta_that_is_not_resident_is_a_deadlock() -> None:
    publish({}, residency=1)
    with pytest.raises(errors.Deadlock, match="residency 1"):
        publish({}, residency=1, order="reversed")
    publish({}, residency=2, order="reversed")


def test_ctas_that_store_to_one_place_without_order() -> None:
    body = TID + "ld.param.u64 %d0, [p0]; setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%d0], VALUE;"
    run(body.replace("VALUE", "7"), [ints(1)], grid=2)
    with pytest.raises(errors.GlobalRace, match="store is not ordered"):
        run(body.replace("VALUE", "%r9"), [ints(1)], grid=3)


# --- bank conflicts and arguments


@pytest.mark.parametrize(
    ("stride", "kind", "excess"),
    [(4, "b32", 0), (8, "b32", 1), (128, "b32", 31), (132, "b32", 0), (0, "b32", 0), (2, "b16", 0),
     (8, "b64", 0), (16, "b64", 2), (16, "v4.b32", 0), (32, "v4.b32", 4), (144, "v4.b32", 0)],
)  # fmt: skip
def test_bank_conflicts(stride: int, kind: str, excess: int) -> None:
    value = (
        "{%r5, %r5, %r5, %r5}"
        if kind.startswith("v4")
        else {"b16": "%h1", "b32": "%r5", "b64": "%d1"}[kind]
    )
    body = (
        TID
        + f"""
        mov.b32 %r5, 0; mov.b16 %h1, 0; mov.b64 %d1, 0;
        mad.lo.u32 %r1, %r0, {stride}, smem;
        st.shared.{kind} [%r1], {value};
    """
    )
    _, report = run(body, shared=8192)
    assert sum(report.bank_conflicts.values()) == excess
    assert all(
        kind in kernel_text(body, 0, 8192).split("\n")[line - 1] for line in report.bank_conflicts
    )


def test_arguments_are_checked() -> None:
    kernel = Module(kernel_text("", 2)).kernels["k"]
    memory = Memory(1 << 20)
    with pytest.raises(errors.ArgumentError, match="takes 2 arguments"):
        launch(kernel, grid=(1,), args=[1], memory=memory, threads=32)
    with pytest.raises(errors.ArgumentError, match="p1 is a u64"):
        launch(kernel, grid=(1,), args=[1, 0.5], memory=memory, threads=32)
    with pytest.raises(errors.ArgumentError, match="full"):
        memory.buffer(np.zeros(1 << 21, np.uint8))


def test_counts_of_instructions_are_per_warp() -> None:
    _, report = run(TID + "setp.lt.u32 %p1, %r0, 32; @%p1 add.s32 %r1, %r0, 1;", threads=96, grid=2)
    assert report.instructions["add.s32"] == 2 and report.instructions["setp.lt.u32"] == 6
    assert report.ctas == 2 and report.launches == 1
