"""Matrix instructions of the interpreter against products in NumPy, laid out by hand.

The fragments and memory layouts here are written down element by element, as the PTX manual draws
them, and share no code with the interpreter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.ptx import errors
from tests.ptx.snippets import run

Matrix = np.ndarray[Any, Any]
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


def draw(rows: int, columns: int, kind: str, seed: int) -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x = x.to(DTYPES[kind])
    return x if kind != "tf32" else (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def raw(x: torch.Tensor) -> Matrix:
    """Bits."""
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32).numpy()


def words(x: Matrix) -> Matrix:
    return np.ascontiguousarray(x).view(np.uint32)


def load(first: int, count: int, pointer: int) -> str:
    """Registers %r<first>.. = the thread's row of ``count`` words at p<pointer>."""
    lines = [f"ld.param.u64 %d9, [p{pointer}]; mad.wide.u32 %d9, %r0, {4 * count}, %d9;"]
    lines += [f"ld.global.b32 %r{first + n}, [%d9+{4 * n}];" for n in range(count)]
    return "\n".join(lines)


def store(first: int, count: int, pointer: int) -> str:
    lines = [f"ld.param.u64 %d9, [p{pointer}]; mad.wide.u32 %d9, %r0, {4 * count}, %d9;"]
    lines += [f"st.global.b32 [%d9+{4 * n}], %r{first + n};" for n in range(count)]
    return "\n".join(lines)


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + n}" for n in range(count)) + "}"


TID = "mov.u32 %r0, %tid.x;\n"


# --- ldmatrix and stmatrix


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    # Row r of matrix m lies at a place of its own: rows in reverse, 16 bytes each.
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    image = matrices.reshape(-1, 8)[::-1].copy()
    trans = ".trans" if transposed else ""
    body = TID + load(100, 4, 0) + f"""
        mad.lo.u32 %r1, %r0, 16, smem;
        setp.lt.u32 %p1, %r0, {8 * count};
        @%p1 st.shared.v4.b32 [%r1], {names(100, 4)};
        bar.sync 0;
        sub.u32 %r2, {8 * count - 1}, %r0; and.b32 %r2, %r2, {8 * count - 1};
        mad.lo.u32 %r2, %r2, 16, smem;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names(10, count)}, [%r2];
        add.u32 %r3, %r2, 512;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r3], {names(10, count)};
        bar.sync 0;
        @%p1 ld.shared.v4.b32 {names(20, 4)}, [%r1+512];
        @!%p1 mov.b32 %r20, 0; @!%p1 mov.b32 %r21, 0; @!%p1 mov.b32 %r22, 0; @!%p1 mov.b32 %r23, 0;
    """ + store(10, count, 1) + store(20, 4, 2)  # fmt: skip
    padded = np.zeros((32, 8), np.uint16)
    padded[: 8 * count] = image
    (_, got, back), report = run(
        body,
        [words(padded), np.zeros(32 * count, np.uint32), np.zeros(128, np.uint32)],
        shared=1024,
    )
    fragments = got.view(np.uint16).reshape(32, count, 2)
    for lane in range(32):
        for m in range(count):
            for e in range(2):
                r, c = lane // 4, 2 * (lane % 4) + e
                want = matrices[m, c, r] if transposed else matrices[m, r, c]
                assert fragments[lane, m, e] == want
    assert np.array_equal(back.view(np.uint16).reshape(32, 8)[: 8 * count], image)
    assert not report.bank_conflicts


def test_ldmatrix_rows_in_the_same_banks_conflict() -> None:
    body = (
        TID
        + """
        mad.lo.u32 %r1, %r0, 128, smem; mov.b32 %r2, 0;
        st.shared.v4.b32 [%r1], {%r2, %r2, %r2, %r2}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r1];
    """
    )
    _, report = run(body, shared=4096)
    assert sorted(report.bank_conflicts.values()) == [28, 28]  # 4 phases of 8 rows


# --- mma.sync


def fragments_a(a: Matrix, per: int) -> Matrix:
    """``[32, registers, per]`` of a 16×k matrix."""
    k = a.shape[1]
    out = np.zeros((32, 16 * k // (32 * per), per), a.dtype)
    for lane in range(32):
        group, t = divmod(lane, 4)
        for reg in range(out.shape[1]):
            for e in range(per):
                out[lane, reg, e] = a[group + 8 * (reg % 2), t * per + e + (reg // 2) * 4 * per]
    return out


@pytest.mark.parametrize(
    ("kind", "k"), [("f16", 16), ("bf16", 16), ("f16", 8), ("bf16", 8), ("tf32", 8), ("tf32", 4)]
)
def test_mma_sync(kind: str, k: int) -> None:
    a, b = draw(32, k, kind, 1), draw(16, k, kind, 2)  # two warps
    c = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(3)).numpy()
    per = 1 if kind == "tf32" else 2
    left = np.concatenate([fragments_a(raw(a)[16 * w : 16 * w + 16], per) for w in range(2)])
    right = np.zeros((64, 8 * k // (32 * per), per), raw(b).dtype)
    start = np.zeros((64, 4), np.float32)
    for thread in range(64):
        warp, (group, t) = thread // 32, divmod(thread % 32, 4)
        for reg in range(right.shape[1]):
            for e in range(per):
                right[thread, reg, e] = raw(b)[8 * warp + group, t * per + e + reg * 4 * per]
        for reg in range(4):
            start[thread, reg] = c[warp, group + 8 * (reg // 2), 2 * t + reg % 2]
    na, nb = left.shape[1], right.shape[1]
    body = TID + load(10, na, 0) + load(20, nb, 1) + load(30, 4, 2) + (
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {names(40, 4)}, "
        f"{names(10, na)}, {names(20, nb)}, {names(30, 4)};"
    ) + store(40, 4, 3)  # fmt: skip
    arrays = [words(left), words(right), words(start), np.zeros(256, np.uint32)]
    (*_, got), report = run(body, arrays, threads=64)
    got = got.view(np.float32).reshape(64, 4)
    for warp in range(2):
        aa, bb = a[16 * warp : 16 * warp + 16].double(), b[8 * warp : 8 * warp + 8].double()
        want = (aa @ bb.T).numpy() + c[warp]
        for lane in range(32):
            for reg in range(4):
                value = want[lane // 4 + 8 * (reg // 2), 2 * (lane % 4) + reg % 2]
                assert got[32 * warp + lane, reg] == np.float32(value)
    assert report.tensor_flops == 2 * 2 * 16 * 8 * k


def test_a_warp_that_has_split_cannot_multiply() -> None:
    body = (
        TID
        + """
        mov.b32 %r10, 0; setp.lt.u32 %p1, %r0, 8; @%p1 bra OTHER;
        mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r1,%r2,%r3,%r4}, {%r10,%r10}, {%r10},
            {%r10,%r10,%r10,%r10};
        OTHER: bar.sync 0;
    """
    )
    with pytest.raises(errors.DivergentWarp):
        run(body)


# --- wgmma

N = 64


def image_k_major(x: Matrix, swizzle: int) -> tuple[Matrix, int, int]:
    """``(bytes, leading, stride offset)`` of [rows, 32 bytes of K], swizzled in such a width."""
    rows = x.view(np.uint8).reshape(len(x), 32)
    width = swizzle or 16
    out = np.zeros(len(x) * max(width, 32), np.uint8)
    for r in range(len(x)):
        for chunk in range(2):
            if swizzle:
                line = r * width
                at = line + ((chunk ^ (line // 128 % (width // 16))) * 16)
            else:  # core matrices of 8 rows by 16 bytes; the two along K follow each other
                at = r // 8 * 256 + chunk * 128 + r % 8 * 16
            out[at : at + 16] = rows[r, 16 * chunk : 16 * chunk + 16]
    return (out, 16, 8 * width) if swizzle else (out, 128, 256)


def image_mn_major(x: Matrix, swizzle: int) -> tuple[Matrix, int, int]:
    """The same for [rows, 16 of K] of 16-bit elements with rows (M or N) contiguous."""
    rows, k = x.shape
    width = (swizzle or 16) // 2  # elements that lie together
    block = 8 * 2 * width  # bytes of 8 k by that many rows
    out = np.zeros(rows * k * 2, np.uint8)
    along_rows, along_k = block * 2, block
    for m in range(rows):
        for kk in range(k):
            line = m // width * along_rows + kk // 8 * along_k + kk % 8 * 2 * width
            chunk = m % width // 8 ^ (line // 128 % (width // 8) if swizzle else 0)
            at = line + chunk * 16 + m % 8 * 2
            out[at : at + 2] = x[m : m + 1, kk : kk + 1].copy().view(np.uint8).ravel()
    # The interleaved form exchanges the roles of the two offsets.
    return (out, along_rows, along_k) if swizzle else (out, along_k, along_rows)


CODE = {0: 0, 128: 1, 64: 2, 32: 3}


def descriptor(offset: int, lead: int, stride: int, swizzle: int, to: str) -> str:
    bits = (lead >> 4) << 16 | (stride >> 4) << 32 | CODE[swizzle] << 62
    return (f"mov.u32 %r1, smem; add.u32 %r1, %r1, {offset}; shr.u32 %r1, %r1, 4;"
            f"cvt.u64.u32 {to}, %r1; or.b64 {to}, {to}, {bits};")  # fmt: skip


STEPS = {
    "fill": "bar.sync 0;",
    "proxy": "fence.proxy.async.shared::cta; bar.sync 0;",
    "fence": "wgmma.fence.sync.aligned;",
    "after": "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
    "late": "",
}


def multiply(
    kind: str, swizzle: int, *, mn_a: bool = False, mn_b: bool = False, registers: bool = False,
    **steps: str,
) -> tuple[Matrix, Matrix, Any]:  # fmt: skip
    """``(got, want [64, N], report)`` of one wgmma over one warpgroup."""
    step = {**STEPS, **steps}
    k, per = (8, 1) if kind == "tf32" else (16, 2)
    a, b = draw(64, k, kind, 4), draw(N, k, kind, 5)
    image_a, lead_a, stride_a = (image_mn_major if mn_a else image_k_major)(raw(a), swizzle)
    image_b, lead_b, stride_b = (image_mn_major if mn_b else image_k_major)(raw(b), swizzle)
    size_a = -(-len(image_a) // 1024) * 1024
    image = np.concatenate([image_a, np.zeros(size_a - len(image_a), np.uint8), image_b])
    image = np.concatenate([image, np.zeros(-len(image) % 2048, np.uint8)])
    rounds = len(image) // 2048
    fill = "".join(
        f"ld.global.v4.b32 {names(50, 4)}, [%d1+{2048 * n}];"
        f"st.shared.v4.b32 [%r2+{2048 * n}], {names(50, 4)};"
        for n in range(rounds)
    )
    left = np.concatenate([fragments_a(raw(a)[16 * w : 16 * w + 16], per) for w in range(4)])
    shapes = f"m64n{N}k{k}.f32.{kind}.{kind}"
    flags = (
        "" if kind == "tf32" else f", {int(mn_b)}" if registers else f", {int(mn_a)}, {int(mn_b)}"
    )
    body = TID + load(60, 4, 2) + f"""
        ld.param.u64 %d1, [p0]; mad.wide.u32 %d1, %r0, 16, %d1; mad.lo.u32 %r2, %r0, 16, smem;
        {fill}
        {step["fill"]} {step["proxy"]}
        {descriptor(0, lead_a, stride_a, swizzle, "%d2")}
        {descriptor(size_a, lead_b, stride_b, swizzle, "%d3")}
        {" ".join(f"mov.b32 %r{100 + n}, 0f3F800000;" for n in range(N // 2))}
        {step["fence"]} setp.eq.u32 %p1, 0, 0;
        wgmma.mma_async.sync.aligned.{shapes} {names(100, N // 2)},
            {names(60, 4) if registers else "%d2"}, %d3, %p1, 1, 1{flags};
        {step["after"]}
    """ + store(100, N // 2, 1) + step["late"]  # fmt: skip
    (_, got, _), report = run(
        body, [words(image), np.zeros(64 * N, np.uint32), words(left)], threads=128, shared=16384
    )
    fragments = got.view(np.float32).reshape(128, N // 8, 2, 2)
    result = np.zeros((64, N), np.float32)
    for thread in range(128):
        row, column = thread // 32 * 16 + thread % 32 // 4, 2 * (thread % 4)
        for block in range(N // 8):
            for half in range(2):
                result[row + 8 * half, 8 * block + column : 8 * block + column + 2] = fragments[
                    thread, block, half
                ]
    want = (a.double() @ b.double().T + 1).float().numpy()
    return result, want, report


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_wgmma_k_major(kind: str, swizzle: int) -> None:
    got, want, report = multiply(kind, swizzle)
    assert np.array_equal(got, want)
    assert report.tensor_flops == 2 * 64 * N * (8 if kind == "tf32" else 16)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("mn_a", "mn_b"), [(True, False), (False, True), (True, True)])
def test_wgmma_mn_major(swizzle: int, mn_a: bool, mn_b: bool) -> None:
    got, want, _ = multiply("bf16", swizzle, mn_a=mn_a, mn_b=mn_b)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("kind", ["f16", "tf32"])
def test_wgmma_with_a_in_registers(kind: str) -> None:
    got, want, _ = multiply(kind, 128, registers=True)
    assert np.array_equal(got, want)


LATE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize(
    ("fault", "steps"),
    [
        (errors.MissingProxyFence, {"proxy": ""}),
        (errors.SharedRace, {"fill": "", "proxy": "fence.proxy.async.shared::cta;"}),
        (errors.WgmmaHazard, {"fence": ""}),
        (errors.WgmmaHazard, {"after": "wgmma.commit_group.sync.aligned;"}),  # never waited for
        (errors.WgmmaHazard, {"after": LATE.replace("0;", "1;")}),
        (errors.WgmmaHazard, {"after": "wgmma.wait_group.sync.aligned 0;"}),  # never committed
        (errors.WgmmaHazard, {"after": f"mov.b32 %r100, 0; {LATE}"}),
        (errors.WgmmaHazard, {"after": f"st.shared.b32 [%r2], %r0; {LATE}"}),
        # Another warp's operand, and no barrier.
        (errors.SharedRace, {"late": "st.shared.b32 [%r2], %r0;"}),
        (errors.WgmmaHazard, {"registers": True, "after": f"mov.b32 %r60, 0; {LATE}"}),
        (errors.WgmmaHazard,
         {"registers": True, "fence": "wgmma.fence.sync.aligned; mov.b32 %r61, 0;"}),
    ],
)  # fmt: skip
def test_wgmma_hazards(fault: type[errors.PtxError], steps: dict[str, Any]) -> None:
    with pytest.raises(fault):
        multiply("bf16", 128, **steps)


def test_wgmma_source_registers_may_be_read_while_it_runs() -> None:
    got, want, _ = multiply("bf16", 128, registers=True, after=f"add.s32 %r5, %r60, 1; {LATE}")
    assert np.array_equal(got, want)
