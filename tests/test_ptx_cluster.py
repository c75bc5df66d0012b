"""Clusters in the interpreter: what they compute, and that each fault is seen."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.ptx import Memory, Module, errors, launch
from tests.ptx.counters import Report
from tests.ptx.ops.tensormap import encode
from tests.ptx.snippets import HEADER, REGISTERS

ARRIVE, WAIT = "barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"
SYNC = ARRIVE + WAIT
# %r0 thread, %r1 own shared memory, %r2 own rank, %r3 size, %r5 the word of thread and CTA in p0.
START = """
    mov.u32 %r0, %tid.x; mov.u32 %r1, smem; mov.u32 %r2, %cluster_ctarank;
    mov.u32 %r3, %cluster_nctarank; mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ntid.x;
    mad.lo.u32 %r5, %r4, %r5, %r0; ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %r5, 4, %d0;
    mad.lo.u32 %r6, %r0, 4, %r1;
"""
NEXT = "add.u32 %r7, %r2, 1; rem.u32 %r7, %r7, %r3; mapa.shared::cluster.u32 %r8, %r6, %r7;"


def run(
    body: str, *, grid: int = 8, cluster: int = 4, threads: int = 64, params: str = "",
    args: tuple[Any, ...] = (), **options: Any,
) -> tuple[Any, Report]:  # fmt: skip
    memory = Memory(1 << 24)
    out = memory.buffer(np.zeros(grid * threads, np.int32), "out")
    made = [a(memory) if callable(a) else a for a in args]
    text = (f"{HEADER}.visible .entry k(.param .u64 p0{params})\n{{{REGISTERS}"
            f".shared .align 1024 .b8 smem[4096];\n{START}{body}\nret;\n}}\n")  # fmt: skip
    report = launch(Module(text).kernels["k"], grid=(grid,), args=[out, *made], memory=memory,
                    threads=threads, cluster=cluster, **options)  # fmt: skip
    return out.array().reshape(grid, threads), report


def test_special_registers() -> None:
    names = ("%cluster_ctarank", "%cluster_nctarank", "%clusterid.x", "%nclusterid.x",
             "%cluster_ctaid.x", "%cluster_nctaid.x", "%is_explicit_cluster")  # fmt: skip
    for name, want in zip(names, ([0, 1, 2, 3] * 2, [4] * 8, [0] * 4 + [1] * 4, [2] * 8,
                                  [0, 1, 2, 3] * 2, [4] * 8, [1] * 8), strict=True):  # fmt: skip
        got, _ = run(f"mov.u32 %r9, {name}; st.global.b32 [%d0], %r9;")
        assert got[:, 0].tolist() == want, name


WRITE = "mad.lo.u32 %r9, %r4, 1000, %r0; st.shared.b32 [%r6], %r9;"
READ = "ld.shared::cluster.b32 %r10, [%r8]; st.global.b32 [%d0], %r10;"


def exchanged() -> Any:
    cta = np.arange(8)
    return (cta // 4 * 4 + (cta + 1) % 4)[:, None] * 1000 + np.arange(64)


@pytest.mark.parametrize("order", ["linear", "reversed", "random"])
@pytest.mark.parametrize("residency", [4, 7, None])
def test_a_cta_reads_its_neighbour(order: Any, residency: int | None) -> None:
    chosen = random.Random(5) if order == "random" else order
    got, report = run(WRITE + NEXT + SYNC + READ + SYNC, order=chosen, residency=residency)
    assert np.array_equal(got, exchanged())
    assert report.remote_load_bytes == 8 * 64 * 4 and not report.remote_store_bytes
    assert report.cluster_barriers == 4


GENERIC = "cvta.shared.u64 %d1, %d1; mapa.u64 %d2, %d1, %r7; ld.u32 %r10, [%d2];"


def test_generic_addresses_and_stores_and_ranks() -> None:
    code = WRITE + NEXT + "cvt.u64.u32 %d1, %r6;" + SYNC + GENERIC + "st.global.b32 [%d0], %r10;"
    assert np.array_equal(run(code + SYNC)[0], exchanged())
    store = NEXT + "mad.lo.u32 %r9, %r4, 1000, %r0;" + SYNC + "st.shared::cluster.b32 [%r8], %r9;"
    got, report = run(store + SYNC + "ld.shared.b32 %r10, [%r6]; st.global.b32 [%d0], %r10;")
    assert got[:, 1].tolist() == [3001, 1, 1001, 2001, 7001, 4001, 5001, 6001]
    assert report.remote_store_bytes == 8 * 64 * 4
    got, _ = run(NEXT + "getctarank.shared::cluster.u32 %r10, %r8; st.global.b32 [%d0], %r10;")
    assert got[:, 0].tolist() == [1, 2, 3, 0] * 2


def test_atomics_in_the_memory_of_another_cta() -> None:
    code = """
        setp.eq.u32 %p0, %r0, 0; @%p0 st.shared.b32 [%r1], 0;""" + SYNC + """
        mapa.shared::cluster.u32 %r8, %r1, 0;
        atom.relaxed.cluster.shared::cluster.add.u32 %r9, [%r8], 1;""" + SYNC + """
        ld.shared.b32 %r10, [%r1]; st.global.b32 [%d0], %r10;"""  # fmt: skip
    got, report = run(code)
    assert got[:, 0].tolist() == [256, 0, 0, 0] * 2 and report.atomics == 0


# By the luck of the schedule the neighbour has not written yet, or has, with nothing between.
UNORDERED = (errors.SharedRace, errors.UninitialisedShared)


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        # No barrier between the neighbour's write and the read, or only a half of one.
        (errors.RemoteShared, WRITE + NEXT + READ + SYNC),
        (UNORDERED, SYNC + WRITE + NEXT + READ + SYNC),
        (UNORDERED, SYNC + WRITE + NEXT + ARRIVE + READ + WAIT + SYNC),
        (UNORDERED, SYNC + WRITE + NEXT + "bar.sync 0;" + READ + SYNC),
        # The arrival releases nothing.
        (errors.SharedRace,
         SYNC + WRITE + NEXT + "barrier.cluster.arrive.relaxed.aligned;" + WAIT + READ + SYNC),
        # The neighbour overwrites what is still being read, or exits.
        (errors.SharedRace, WRITE + NEXT + SYNC + READ + "st.shared.b32 [%r6], 7;" + SYNC),
        (errors.RemoteShared, WRITE + NEXT + SYNC + READ),
        (errors.UninitialisedShared, NEXT + SYNC + READ + SYNC),
        (errors.OutOfBounds, SYNC + "mapa.shared::cluster.u32 %r8, %r6, 4;"),
        (errors.OutOfBounds, WRITE + NEXT + SYNC + "ld.shared.b32 %r10, [%r8];"),
        (errors.OutOfBounds, NEXT + SYNC + "ld.shared::cluster.b32 %r10, [%r8+8192];"),
        (errors.BarrierMisuse, ARRIVE + ARRIVE),
        (errors.BarrierMisuse, WAIT),
        (errors.Deadlock, "setp.eq.u32 %p0, %r2, 0; @%p0 bra SKIP;" + SYNC
         + "SKIP: setp.eq.u32 %p1, %r2, 0; @!%p1 bra OUT; L: ld.volatile.global.b32 %r9, [%d0];"
         "setp.eq.u32 %p2, %r9, 0; @%p2 bra L; OUT:"),
    ],
)  # fmt: skip
def test_faults(fault: Any, body: str) -> None:
    with pytest.raises(fault):
        run(body, spin_limit=50)


def test_threads_that_have_exited_do_not_hold_the_barrier_up() -> None:
    code = "setp.ge.u32 %p0, %r0, 32; @%p0 bra END;" + WRITE + NEXT + SYNC + READ + SYNC + "END:"
    got, _ = run(code)
    assert np.array_equal(got[:, :32], exchanged()[:, :32])


@pytest.mark.parametrize("instruction", ["barrier.cluster.try", "st.async.shared::cluster.b32",
                                         "cp.async.bulk.shared::cluster.shared::cta"])  # fmt: skip
def test_what_is_not_modelled_raises(instruction: str) -> None:
    with pytest.raises(errors.UnknownInstruction, match=instruction.split(".")[1]):
        run(f"{instruction} [%r6], %r9;")


def test_launches_that_cannot_be() -> None:
    with pytest.raises(errors.ArgumentError, match="clusters of 3"):
        run("", cluster=3)
    with pytest.raises(errors.ArgumentError, match="never starts"):
        run("", residency=3)


# CTA 0 owns a barrier; one thread of every CTA arrives there, and CTA 0 waits.
INIT = "setp.eq.u32 %p0, %r0, 0; add.u32 %r11, %r1, 2048; @%p0 mbarrier.init.shared.b64 [%r11], 4;"
REMOTE = "mapa.shared::cluster.u32 %r12, %r11, 0; mapa.shared::cluster.u32 %r13, %r6, 0;"
SLOT = "mad.lo.u32 %r13, %r2, 4, %r13; mov.u32 %r14, 5;"
PUT = "@%p0 st.shared::cluster.b32 [%r13], %r14;"
SIGNAL = "@%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r12];"
HOLD = """setp.ne.u32 %p1, %r2, 0; @%p1 bra OUT;
    W: mbarrier.try_wait.parity.acquire.cluster.shared.b64 %p2, [%r11], 0; @!%p2 bra W;
    setp.ge.u32 %p3, %r0, 4; @%p3 bra OUT; ld.shared.b32 %r15, [%r6]; st.global.b32 [%d0], %r15;
    OUT:"""


def test_arrivals_at_a_barrier_of_another_cta() -> None:
    got, report = run(INIT + REMOTE + SLOT + SYNC + PUT + SIGNAL + HOLD)
    assert got[:, :4].tolist() == [[5] * 4, *[[0] * 4] * 3] * 2
    assert report.remote_store_bytes == 2 * 3 * 4


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        (errors.RemoteShared, INIT + "bar.sync 0;" + REMOTE + SLOT + PUT + SIGNAL + HOLD),
        (errors.BarrierMisuse, INIT.split("@")[0] + REMOTE + SYNC + SIGNAL),
        (errors.SharedRace,  # arrives with the scope of its own CTA
         INIT + REMOTE + SLOT + SYNC + PUT + SIGNAL.replace(".release.cluster", "") + HOLD),
        (errors.SharedRace,  # the wait has the scope of its own CTA
         INIT + REMOTE + SLOT + SYNC + PUT + SIGNAL + HOLD.replace(".acquire.cluster", "")),
        (errors.SharedRace, INIT + REMOTE + SLOT + SYNC + SIGNAL + PUT + HOLD),
        (errors.Deadlock,
         INIT + REMOTE + SLOT + SYNC + "setp.eq.u32 %p4, %r2, 3; @%p4 bra OUT;" + SIGNAL + HOLD),
        (errors.UnknownInstruction,
         INIT + REMOTE + SYNC + HOLD.replace("cluster.shared.b64", "cluster.shared::cluster.b64")),
    ],
)  # fmt: skip
def test_faults_of_remote_arrivals(fault: type[errors.PtxError], body: str) -> None:
    with pytest.raises(fault):
        run(body)


# CTA 1 reads its word and arrives at a barrier of CTA 0, which then overwrites the word.
REUSE = """
    setp.eq.u32 %p0, %r0, 0; add.u32 %r11, %r1, 2048; @%p0 mbarrier.init.shared.b64 [%r11], 1;
    st.shared.b32 [%r6], 3;""" + SYNC + """
    setp.eq.u32 %p1, %r2, 0; @%p1 bra OWNER;
    READ mapa.shared::cluster.u32 %r12, %r11, 0;
    @%p0 mbarrier.arrive.shared::cluster.b64 _, [%r12]; LATE bra OUT;
    OWNER: W: mbarrier.try_wait.parity.shared.b64 %p2, [%r11], 0; @!%p2 bra W;
    mapa.shared::cluster.u32 %r13, %r6, 1; st.shared::cluster.b32 [%r13], 4;
    OUT: """ + SYNC + "ld.shared.b32 %r15, [%r6]; st.global.b32 [%d0], %r15;"  # fmt: skip
LOAD = "ld.shared.b32 %r14, [%r6];"


def test_an_arrival_of_cta_scope_orders_reads_and_no_more() -> None:
    def reused(read: str, late: str) -> Any:
        body = REUSE.replace("READ", read).replace("LATE", late)
        return run(body, grid=2, cluster=2, threads=32)[0]

    assert reused(LOAD, "")[:, 0].tolist() == [3, 4]
    with pytest.raises(errors.SharedRace, match="overwrites what another warp read"):
        reused("", LOAD)
    with pytest.raises(errors.SharedRace, match="overwrites another warp's write"):
        reused("st.shared.b32 [%r6], 5;", "")


# Each of two CTAs brings its half of a box of 16 rows to both; each expects the whole.
CAST = """
    setp.eq.u32 %p0, %r0, 0; add.u32 %r11, %r1, 2048; @%p0 mbarrier.init.shared.b64 [%r11], 1;
    START
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r11], 1024;
    mad.lo.u32 %r12, %r2, 512, %r1; mad.lo.u32 %r13, %r2, 8, 0; mov.u16 %h1, MASK;
    @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        .multicast::cluster [%r12], [map, {0, %r13}], [%r11], %h1;
    W: mbarrier.try_wait.parity.shared.b64 %p2, [%r11], 0; @!%p2 bra W;
    ld.shared.b32 %r15, [%r6]; st.global.b32 [%d0], %r15;
""".replace("\n        .multi", ".multi")


def cast(start: str = SYNC, mask: int = 3, end: str = SYNC) -> tuple[Any, Report]:
    data = np.arange(16 * 16, dtype=np.int32).reshape(16, 16)

    def tensor(memory: Memory) -> bytes:
        source = memory.buffer(data, "x", False)
        return encode(source.address, "s32", (16, 16), [64], (16, 8))

    body = CAST.replace("START", start).replace("MASK", str(mask)) + end
    got, report = run(body, grid=2, cluster=2, threads=256, args=(tensor,),
                      params=", .param .align 64 .b8 map[128]")  # fmt: skip
    return got, report


def test_a_multicast_brings_a_box_to_several_ctas() -> None:
    got, report = cast(end="")  # whoever has all bytes knows that nobody touches its memory again
    assert np.array_equal(got, np.tile(np.arange(256), (2, 1)))
    assert report.global_load_bytes == 1024 and report.multicast_bytes == 1024


def test_faults_of_multicasts() -> None:
    with pytest.raises(errors.RemoteShared, match="may not have started"):
        cast(start="bar.sync 0;")
    with pytest.raises(errors.Deadlock):
        cast(mask=1)
    with pytest.raises(errors.OutOfBounds, match="multicast mask"):
        cast(mask=5)
