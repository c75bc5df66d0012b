"""The interpreter's arithmetic against NumPy, exact fractions and PyTorch."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.ptx import errors
from tests.ptx.snippets import per_thread, run

EDGE = np.array([0, 1, 2, 3, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF])


def words(count: int = 256, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint32]]:
    random = np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)
    pairs = np.stack(np.meshgrid(EDGE, EDGE), -1).reshape(-1, 2).astype(np.uint32)
    return np.concatenate([pairs[:, seed % 2], random])


def floats(count: int = 512, seed: int = 0, dtype: Any = np.float32) -> Any:
    r = np.random.default_rng(seed)
    wide = r.standard_normal(count) * 2.0 ** r.integers(-12, 12, count)
    return wide.astype(dtype)


A, B, C = words(seed=0), words(seed=1), words(seed=2)
SIGNED = [a.astype(np.int64) for a in (A.view(np.int32), B.view(np.int32), C.view(np.int32))]
PLAIN = [a.astype(object) for a in (A, B, C)]
INTEGER = {
    "add.s32 out, a0, a1": lambda s, u: u[0] + u[1],
    "sub.u32 out, a0, a1": lambda s, u: u[0] - u[1],
    "mul.lo.s32 out, a0, a1": lambda s, u: u[0] * u[1],
    "mul.hi.u32 out, a0, a1": lambda s, u: u[0] * u[1] >> 32,
    "mul.hi.s32 out, a0, a1": lambda s, u: s[0].astype(object) * s[1].astype(object) >> 32,
    "mad.lo.u32 out, a0, a1, a2": lambda s, u: u[0] * u[1] + u[2],
    "mad.hi.u32 out, a0, a1, a2": lambda s, u: (u[0] * u[1] >> 32) + u[2],
    "min.s32 out, a0, a1": lambda s, u: np.minimum(s[0], s[1]),
    "max.u32 out, a0, a1": lambda s, u: np.maximum(u[0], u[1]),
    "neg.s32 out, a0": lambda s, u: -s[0],
    "abs.s32 out, a0": lambda s, u: np.abs(s[0]),
    "and.b32 out, a0, a1": lambda s, u: u[0] & u[1],
    "xor.b32 out, a0, -1": lambda s, u: u[0] ^ 0xFFFFFFFF,
    "not.b32 out, a0": lambda s, u: u[0] ^ 0xFFFFFFFF,
    "shl.b32 out, a0, a1": lambda s, u: np.where(u[1] > 31, 0, u[0] << np.minimum(u[1], 31)),
    "shr.u32 out, a0, a1": lambda s, u: np.where(u[1] > 31, 0, u[0] >> np.minimum(u[1], 31)),
    "shr.s32 out, a0, a1": lambda s, u: s[0] >> np.minimum(B.astype(np.int64), 31),
    "shf.l.wrap.b32 out, a0, a1, a2": lambda s, u: ((u[1] << 32 | u[0]) << (u[2] & 31)) >> 32,
    "shf.r.clamp.b32 out, a0, a1, a2": lambda s, u: (u[1] << 32 | u[0]) >> np.minimum(u[2], 32),
    "popc.b32 out, a0": lambda s, u: np.array([v.bit_count() for v in u[0]]),
    "clz.b32 out, a0": lambda s, u: np.array([32 - v.bit_length() for v in u[0]]),
    "bfind.u32 out, a0": lambda s, u: np.array([v.bit_length() - 1 for v in u[0]]),
    "brev.b32 out, a0": lambda s, u: np.array([int(f"{v:032b}"[::-1], 2) for v in u[0]]),
    "lop3.b32 out, a0, a1, a2, 0x96": lambda s, u: u[0] ^ u[1] ^ u[2],
    "lop3.b32 out, a0, a1, a2, 0xca": lambda s, u: (u[0] & u[1]) | ((u[0] ^ 0xFFFFFFFF) & u[2]),
    "bfe.u32 out, a0, 5, 7": lambda s, u: u[0] >> 5 & 127,
    "bfe.s32 out, a0, 5, 7": lambda s, u: ((u[0] >> 5 & 127) ^ 64) - 64,
    "bfe.u32 out, a0, 28, 9": lambda s, u: u[0] >> 28,
    "bfi.b32 out, a0, a1, 4, 8": lambda s, u: (u[1] & ~0xFF0) | (u[0] & 255) << 4,
    "selp.b32 out, a0, a1, %p1": lambda s, u: np.where(u[0] < u[1], u[0], u[1]),
    "slct.b32.s32 out, a0, a1, a2": lambda s, u: np.where(s[2] >= 0, u[0], u[1]),
    "sad.u32 out, a0, a1, a2": lambda s, u: np.abs(u[0] - u[1]) + u[2],
}  # fmt: skip


@pytest.mark.parametrize("code", INTEGER)
def test_integer(code: str) -> None:
    got = per_thread(f"setp.lt.u32 %p1, a0, a1; {code};", [A, B, C], np.uint32)
    want = INTEGER[code](SIGNED, PLAIN)
    assert np.array_equal(got, (want.astype(object) & 0xFFFFFFFF).astype(np.uint32))


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("mul.wide.u32 out, a0, a1", lambda a, b: a * b),
        ("mad.wide.u32 out, a0, a1, 5", lambda a, b: a * b + 5),
        ("cvt.u64.u32 %d1, a0; cvt.u64.u32 %d2, a1; mad.lo.s64 out, %d1, %d2, -3",
         lambda a, b: a * b - 3),
        ("mov.b64 out, {a0, a1}", lambda a, b: a | b << 32),
        ("mov.b64 %d1, {a0, a1}; mov.b64 {%r1, %r2}, %d1; mov.b64 out, {%r2, %r1}",
         lambda a, b: b | a << 32),
        ("mov.b64 %d1, {a0, a1}; mul.hi.u64 out, %d1, %d1", lambda a, b: (a | b << 32) ** 2 >> 64),
        ("mov.b64 %d1, {a0, a1}; shl.b64 out, %d1, 3", lambda a, b: (a | b << 32) << 3),
        ("mov.b64 %d1, {a0, a1}; div.u64 out, %d1, 7", lambda a, b: (a | b << 32) // 7),
    ],
)  # fmt: skip
def test_wide_integer(code: str, function: Any) -> None:
    got = per_thread(f"{code};", [A, B], np.uint64)
    want = [int(v) & (1 << 64) - 1 for v in function(PLAIN[0], PLAIN[1])]
    assert [int(v) for v in got] == want


def test_signed_division_truncates_and_the_remainder_has_the_dividends_sign() -> None:
    a = np.array([7, -7, 7, -7, 0, -(2**31), 12345], np.int32)
    b = np.array([2, 2, -2, -2, 5, 3, 12345], np.int32)
    quotient = per_thread("div.s32 out, a0, a1;", [a, b], np.int32)
    remainder = per_thread("rem.s32 out, a0, a1;", [a, b], np.int32)
    for x, y, q, r in zip(
        a.tolist(), b.tolist(), quotient.tolist(), remainder.tolist(), strict=True
    ):
        assert (q, r) == (int(Fraction(x, y)), math.fmod(x, y))


def test_prmt_picks_bytes_and_spreads_signs() -> None:
    got = per_thread("prmt.b32 out, a0, a1, 0x8f50;", [A, B], np.uint32)
    for a, b, d in zip(A.tolist(), B.tolist(), got.tolist(), strict=True):
        raw = (b << 32 | a).to_bytes(8, "little")
        spread = [255 if raw[n] & 128 else 0 for n in (7, 0)]
        assert d.to_bytes(4, "little") == bytes([raw[0], raw[5], spread[0], spread[1]])


@pytest.mark.parametrize("kind", ["s16", "u16"])
def test_sixteen_bits(kind: str) -> None:
    a, b = words(seed=3).astype(np.uint16), words(seed=4).astype(np.uint16)
    got = per_thread(f"mul.wide.{kind} out, a0, a1;", [a, b], np.uint32)
    dtype = np.int16 if kind == "s16" else np.uint16
    want = a.view(dtype).astype(np.int64) * b.view(dtype).astype(np.int64)
    assert np.array_equal(got, want.astype(np.uint32))


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("add.f32 out, a0, a1", np.add),
        ("sub.rn.f32 out, a0, a1", np.subtract),
        ("mul.f32 out, a0, a1", np.multiply),
        ("div.rn.f32 out, a0, a1", np.divide),
        ("div.full.f32 out, a0, a1", np.divide),
        ("max.f32 out, a0, a1", np.maximum),
        ("abs.f32 out, a0", lambda a, b: np.abs(a)),
        ("neg.f32 out, a0", lambda a, b: -a),
        ("mul.f32 out, a0, 0f40000000", lambda a, b: a * np.float32(2)),
        ("ex2.approx.f32 out, a0", lambda a, b: np.exp2(a.astype(np.float64)).astype(np.float32)),
        ("rcp.approx.f32 out, a0", lambda a, b: (1 / a.astype(np.float64)).astype(np.float32)),
        ("abs.f32 %f1, a0; sqrt.rn.f32 out, %f1", lambda a, b: np.sqrt(np.abs(a))),
    ],
)  # fmt: skip
def test_float32(code: str, function: Any) -> None:
    a, b = floats(seed=1), floats(seed=2)
    got = per_thread(f"{code};", [a, b], np.float32)
    with np.errstate(over="ignore"):
        assert np.array_equal(got, function(a, b))


def nearest(x: Fraction, bits: int) -> float:
    """The float of so many significant bits nearest to x, ties to even."""
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x)))
    while abs(x) >= 2 ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - bits + 1)
    return float(round(x / unit) * unit)


def test_fma_rounds_once() -> None:
    a, b = floats(seed=3), floats(seed=4)
    # Sums in which the product's last bits decide a tie of the float64 sum.
    c = np.where(
        np.arange(512) % 2 == 0, floats(seed=5), -(a.astype(np.float64) * b).astype(np.float32)
    )
    got = per_thread("fma.rn.f32 out, a0, a1, a2;", [a, b, c.astype(np.float32)], np.float32)
    for x, y, z, d in zip(
        a.tolist(), b.tolist(), c.astype(np.float32).tolist(), got.tolist(), strict=True
    ):
        assert d == nearest(Fraction(x) * Fraction(y) + Fraction(z), 24)


def test_fma_survives_what_double_rounding_does_not() -> None:
    # 2^-60 above the tie between 1 and its successor: float64 drops it, and the tie goes to even.
    a = np.full(32, 1 + 2.0**-22, np.float32)
    b = np.full(32, 2.0**-24 * (1 - 2.0**-22), np.float32)
    c = np.full(32, 1 + 2.0**-23, np.float32)
    exact = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0]))
    got = per_thread("fma.rn.f32 out, a0, a1, a2;", [a, b, c], np.float32)
    twice = np.float32(float(a[0]) * float(b[0]) + float(c[0]))
    assert float(got[0]) == nearest(exact, 24) != float(twice)


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("operation", ["add", "mul", "fma.rn", "max"])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision(name: str, dtype: torch.dtype, operation: str, packed: bool) -> None:
    x = [torch.from_numpy(floats(seed=s)).to(dtype) for s in (6, 7, 8)]
    raw = [t.view(torch.int16).numpy().view(np.uint16) for t in x]
    sources = "a0, a1, a2" if operation == "fma.rn" else "a0, a1"
    if packed:
        raw = [r.view(np.uint32) for r in raw]
    kind = f"{name}x2" if packed else name
    got = per_thread(f"{operation}.{kind} out, {sources};", raw, np.uint32 if packed else np.uint16)
    y = torch.from_numpy(got.view(np.int16).copy()).view(dtype)
    bits = 11 if name == "f16" else 8
    for n, d in enumerate(y.tolist()):
        a, b, c = (Fraction(t[n].item()) for t in x)
        exact = {"add": a + b, "mul": a * b, "fma.rn": a * b + c, "max": max(a, b)}[operation]
        if Fraction(1, 2**13) < abs(exact) < 60000:  # normal numbers of both formats
            assert d == nearest(exact, bits)


def test_denormals_are_flushed_only_on_request() -> None:
    a = np.array([1e-39, -1e-39, 1.0, 3e-38], np.float32)
    b = np.array([1.0, 1.0, 1.0, 0.1], np.float32)
    assert np.array_equal(per_thread("mul.f32 out, a0, a1;", [a, b], np.float32), a * b)
    flushed = per_thread("mul.ftz.f32 out, a0, a1;", [a, b], np.float32)
    assert np.array_equal(flushed, [0, -0.0, 1, 0]) and np.signbit(flushed[1])


SPECIAL = np.array(
    [0, -0.0, 1, np.inf, -np.inf, np.nan, 65504, 65520, 70000, 1e-8, 3.4e38], np.float32
)
TIES = (np.arange(256, dtype=np.uint32) * 0x8000 + 0x3F800000).view(np.float32)


def as_f16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.from_numpy(x.copy()).half().view(torch.int16).numpy().view(np.uint16)


def as_bf16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_rounding_to_sixteen_bits(kind: str) -> None:
    x = np.concatenate([SPECIAL, TIES, floats(seed=9)])
    want = (as_f16 if kind == "f16" else as_bf16)(x)
    got = per_thread(f"cvt.rn.{kind}.f32 out, a0;", [x], np.uint16)
    number = ~np.isnan(x)
    assert np.array_equal(got[number], want[number])
    wide = per_thread(f"cvt.f32.{kind} out, a0;", [got], np.float32)
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    back = torch.from_numpy(got.view(np.int16).copy()).view(dtype).float().numpy()
    assert np.array_equal(wide[number], back[number])
    assert np.isnan(wide[~number]).all()
    both = per_thread(f"cvt.rn.{kind}x2.f32 out, a0, a1;", [x, x[::-1].copy()], np.uint32)
    assert np.array_equal(both & 0xFFFF, got[::-1]) and np.array_equal(both >> 16, got)
    down = per_thread(f"cvt.rz.{kind}.f32 out, a0;", [x], np.uint16)
    value = torch.from_numpy(down.view(np.int16).copy()).view(dtype).float().numpy()
    finite = np.isfinite(x)
    assert (np.abs(value[finite]) <= np.abs(x[finite])).all()


def test_tf32_rounding() -> None:
    x = np.concatenate([floats(seed=10), TIES])
    got = per_thread("cvt.rna.tf32.f32 out, a0;", [x], np.float32)
    for value, rounded in zip(x.tolist(), got.tolist(), strict=True):
        unit = Fraction(2) ** (math.frexp(value)[1] - 11)
        down = math.floor(abs(Fraction(value)) / unit + Fraction(1, 2)) * unit  # ties away
        assert abs(rounded) == float(down)


@pytest.mark.parametrize(
    ("mode", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_float_to_integer_rounds_and_clamps(mode: str, function: Any) -> None:
    x = np.array([0.5, 1.5, -0.5, -1.5, 2.5, 1e10, -1e10, np.nan, 7.99, -7.99], np.float32)
    got = per_thread(f"cvt.{mode}.s32.f32 out, a0;", [x], np.int32)
    want = np.clip(function(np.nan_to_num(x.astype(np.float64))), -(2**31), 2**31 - 1)
    assert np.array_equal(got, want.astype(np.int32))
    unsigned = per_thread(f"cvt.{mode}.u32.f32 out, a0;", [x], np.uint32)
    want = np.clip(function(np.nan_to_num(x.astype(np.float64))), 0, 2**32 - 1)
    assert np.array_equal(unsigned, want.astype(np.uint32))


def test_integer_conversions_extend_truncate_and_saturate() -> None:
    assert np.array_equal(per_thread("cvt.s64.s32 out, a0;", [A], np.int64), SIGNED[0])
    assert np.array_equal(per_thread("cvt.u64.u32 out, a0;", [A], np.uint64), A.astype(np.uint64))
    assert np.array_equal(per_thread("cvt.u16.u32 out, a0;", [A], np.uint16), A.astype(np.uint16))
    assert np.array_equal(
        per_thread("cvt.sat.s16.s32 %h1, a0; cvt.s32.s16 out, %h1;", [A], np.int32),
        np.clip(SIGNED[0], -32768, 32767),
    )
    assert np.array_equal(
        per_thread("cvt.s32.s8 out, a0;", [A], np.int32), A.astype(np.int8).astype(np.int32)
    )
    assert np.array_equal(
        per_thread("cvt.rn.f32.s32 out, a0;", [A], np.float32), SIGNED[0].astype(np.float32)
    )
    assert np.array_equal(
        per_thread("cvt.rn.f32.u32 out, a0;", [A], np.float32), A.astype(np.float32)
    )


def test_comparisons_know_nan_and_combine() -> None:
    a = np.array([1, 2, np.nan, 1, np.nan, 3], np.float32)
    b = np.array([2, 2, 1, np.nan, np.nan, 1], np.float32)
    flags = {"lt": a < b, "ltu": (a < b) | np.isnan(a) | np.isnan(b), "eq": a == b, "neu": a != b,
             "ne": (a < b) | (a > b), "num": ~(np.isnan(a) | np.isnan(b)),
             "gtu": ~(a <= b)}  # fmt: skip
    for name, want in flags.items():
        got = per_thread(
            f"setp.{name}.f32 %p1, a0, a1; selp.b32 out, 1, 0, %p1;", [a, b], np.uint32
        )
        assert np.array_equal(got, want), name
    got = per_thread(
        "setp.gt.u32 %p2, a0, 9; setp.lt.and.u32 %p1|%p3, a0, a1, %p2;"
        "selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p3; or.b32 out, %r1, %r2;",
        [A, B], np.uint32,
    )  # fmt: skip
    assert np.array_equal(got, np.where(A > 9, np.where(A < B, 1, 2), 0))


def test_float64() -> None:
    a, b = floats(seed=11, dtype=np.float64), floats(seed=12, dtype=np.float64)
    assert np.array_equal(per_thread("add.f64 out, a0, a1;", [a, b], np.float64), a + b)
    got = per_thread("fma.rn.f64 out, a0, a1, a1;", [a, b], np.float64)
    want = [
        float(Fraction(x) * Fraction(y) + Fraction(y))
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert np.array_equal(got, want)
    assert np.array_equal(
        per_thread("cvt.rn.f32.f64 out, a0;", [a], np.float32), a.astype(np.float32)
    )


def test_unknown_instructions_say_which_when_they_are_reached() -> None:
    run("bra DONE; frobnicate.f32 %f1, %f2; DONE:")
    with pytest.raises(errors.UnknownInstruction, match=r"frobnicate\.f32"):
        run("frobnicate.f32 %f1, %f2;")
    with pytest.raises(errors.UnknownInstruction, match=r"add\.rz\.f32"):
        run("mov.b32 %f2, 0f00000000; add.rz.f32 %f1, %f2, %f2;")
