"""A, R, B and S: every convention, every carrier of a weight, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraxs_kernels as lxk
from tests.svd.cases import spectrum, with_spectrum


def weight(m: int = 60, n: int = 44, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(m * 1000 + n)
    return with_spectrum(m, n, spectrum("power law", min(m, n), generator), generator).to(dtype)


def best(W: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


# What the conventions of other implementations store: (arguments, A A^T, B^T B, R).
# S is diag of the singular values, I the identity, 0 nothing.
CONVENTIONS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "official, AW-LoRA-XS, SkyRL, lora-lite": ({}, "S2", "I", "normal"),
    "official, scikit-learn 1.4": ({"sign": "v"}, "S2", "I", "normal"),
    "LoRA-SB, Fed-SB": (
        {"sigma": "none", "r_init": "singular", "sign": None}, "I", "I", "S"),
    "PEFT TinyLoRA": ({"sigma": "both", "r_init": "zeros", "sign": None}, "S", "S", "0"),
    "PEFT PSOFT": ({"sigma": "B", "r_init": "identity", "sign": None}, "I", "S2", "I"),
    "Stable Audio 3": ({"sigma": "none", "r_init": "zeros"}, "I", "I", "0"),
    "EigenTune": ({"sigma": "none", "r_init": "zeros", "sign": "v"}, "I", "I", "0"),
    "CLIP-LoRA_XS, scalingrl": ({"sigma": "B", "sign": None}, "I", "S2", "normal"),
    "RaSTA, SHFormer": ({"sigma": "both", "r_init": "zeros"}, "S", "S", "0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("shape", [(60, 44), (44, 60)])
def test_conventions(name: str, shape: tuple[int, int]) -> None:
    options, a, b, r = CONVENTIONS[name]
    W, rank = weight(*shape), 6
    f = lxk.lora_xs_factors(W, rank, **options)
    eye = torch.eye(rank)
    expected = {
        "0": 0 * eye, "I": eye, "S": torch.diag(f.S), "S2": torch.diag(f.S**2)
    }  # fmt: skip
    torch.testing.assert_close(f.A @ f.A.T, expected[a], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(f.B.T @ f.B, expected[b], rtol=1e-5, atol=1e-5)
    if r == "normal":
        assert 0 < f.R.abs().max() < 6e-5 and f.R.dtype is torch.float32
    else:
        assert torch.equal(f.R, expected[r])
    sides = {"S2": 1.0, "S": 0.5, "I": 0.0}
    core = torch.diag(f.S ** (1 - sides[a] - sides[b]))
    torch.testing.assert_close((f.B @ core @ f.A).double(), best(W, rank), rtol=0, atol=1e-5)
    sign = options.get("sign", "u")
    if sign is not None:
        rows = f.B.T if sign == "u" else f.A
        assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("rule", ["u", "v"])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_official_factors_are_those_of_scikit_learn(
    shape: tuple[int, int], rule: str, rank: int
) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    extmath = pytest.importorskip("sklearn.utils.extmath")
    generator = torch.Generator().manual_seed(5)
    W = with_spectrum(*shape, spectrum("slow power law", 300, generator), generator).float()
    # As the official code does: on the CPU, in NumPy, on the transposed weight.
    model = decomposition.TruncatedSVD(n_components=rank, n_iter=10, random_state=42)
    scores = model.fit_transform(W.T.numpy())
    right, left = extmath.svd_flip(
        scores / model.singular_values_, model.components_, u_based_decision=rule == "v"
    )
    A = torch.from_numpy((right * model.singular_values_).T.copy()).double()
    B = torch.from_numpy(left.T.copy()).double()
    ours = lxk.lora_xs_factors(W, rank, sign=rule)
    # Their own error against LAPACK, with the same sign rule, is what the difference may be; a sign
    # that differs would make a difference of twice the vector.
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    for found, theirs, true in (
        (ours.A, A, S[:rank, None] * Vh[:rank]),
        (ours.B.T, B.T, U.T[:rank]),
    ):
        flips = torch.where((theirs * true).sum(1, keepdim=True) < 0, -1.0, 1.0)
        their_error = (theirs - flips * true).norm(dim=1)
        our_difference = (found.double() - theirs).norm(dim=1)
        assert bool((our_difference <= 1.5 * their_error + 1e-2 * theirs.norm(dim=1)).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("subspace", ["top", "middle", "bottom", "random"])
def test_dtypes_and_compact_results(dtype: torch.dtype, subspace: str) -> None:
    W = weight(40, 70, dtype).requires_grad_()
    f = lxk.lora_xs_factors(W, 5, subspace=subspace)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert [t.dtype for t in f] == [dtype, wide, dtype, wide]
    assert [tuple(t.shape) for t in f] == [(5, 70), (5, 5), (40, 5), (5,)]
    for t in f:
        assert t.is_contiguous() and not t.requires_grad
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
    narrow = lxk.lora_xs_factors(W, 5, subspace=subspace, dtype=torch.bfloat16)
    exact = lxk.lora_xs_factors(W, 5, subspace=subspace, dtype=wide)
    assert torch.equal(narrow.A, exact.A.bfloat16()) and torch.equal(narrow.B, exact.B.bfloat16())


def test_subspaces() -> None:
    W = weight(30, 20).double()
    S = torch.linalg.svdvals(W)
    for subspace, first in (("top", 0), ("middle", 8), ("bottom", 16)):
        f = lxk.lora_xs_factors(W, 4, subspace=subspace)
        torch.testing.assert_close(f.S, S[first : first + 4])
        torch.testing.assert_close(W @ f.A.T, f.B * f.S**2)
    f = lxk.lora_xs_factors(W, 4, subspace="random", seed=3)
    torch.testing.assert_close(f.B.T @ f.B, torch.eye(4, dtype=W.dtype))
    assert not torch.equal(f.A, lxk.lora_xs_factors(W, 4, subspace="random", seed=4).A)


@pytest.mark.parametrize("subspace", ["top", "random"])
def test_private_generators(subspace: str) -> None:
    W = weight(300, 260)
    state = torch.get_rng_state()
    one = lxk.lora_xs_factors(W, 7, seed=11, subspace=subspace)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    two = lxk.lora_xs_factors(W, 7, seed=11, subspace=subspace)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.R, lxk.lora_xs_factors(W, 7, seed=12, subspace=subspace).R)


class Packed(nn.Module):
    """A quantized layer: ``weight`` is an object that only ``dequantize`` makes a matrix of."""

    class Codes:
        def __init__(self, W: Tensor) -> None:
            self.scale = W.abs().max() / 127
            self.codes = (W / self.scale).round().to(torch.int8)

        def dequantize(self) -> Tensor:
            return self.codes.float() * self.scale

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.weight = self.Codes(W)


class CodesTensor(Tensor):
    """A quantized weight of the other kind: a tensor whose dtype says nothing about its numbers."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor).float() * 0.5


def test_carriers_of_a_weight() -> None:
    W = weight()
    expected = lxk.lora_xs_factors(W, 5)

    def same(source: Any, reference: lxk.LoRAXSFactors = expected) -> bool:
        got = lxk.lora_xs_factors(source, 5)
        return all(torch.equal(a, b) for a, b in zip(got, reference, strict=True))

    linear = nn.Linear(44, 60)
    linear.weight = nn.Parameter(W.clone())
    assert same(linear) and same(linear.weight) and same(lambda: W)
    wide = torch.zeros(120, 132)
    wide[::2, ::3] = W
    assert same(wide[::2, ::3])
    packed = Packed(W)
    assert same(packed, lxk.lora_xs_factors(packed.weight.dequantize(), 5))
    codes = (W * 50).round().to(torch.int8).as_subclass(CodesTensor)
    assert same(codes, lxk.lora_xs_factors(codes.dequantize(), 5))


def test_conv1d_is_transposed() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    W = weight()
    conv = pytorch_utils.Conv1D(60, 44)
    conv.weight = nn.Parameter(W.T.contiguous())
    got, expected = lxk.lora_xs_factors(conv, 5), lxk.lora_xs_factors(W, 5)
    assert got.A.shape == (5, 44) and got.B.shape == (60, 5)
    torch.testing.assert_close(got.A, expected.A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.B, expected.B, rtol=1e-4, atol=1e-5)


W = weight(8, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": [[1.0]]}, TypeError, "^weight.*list"),
        ({"weight": None}, TypeError, "^weight"),
        ({"weight": nn.ReLU()}, TypeError, "^weight.*ReLU"),
        ({"weight": lambda: "no matrix"}, TypeError, "^weight.*str"),
        ({"weight": torch.ones(4, 4, dtype=torch.uint8)}, TypeError, "^weight.*uint8"),
        ({"weight": torch.ones(4, 4, dtype=torch.complex64)}, TypeError, "^weight.*complex"),
        ({"weight": torch.ones(4, 4).to_sparse()}, TypeError, "^weight.*sparse"),
        ({"weight": torch.ones(4, 4, device="meta")}, ValueError, "^weight.*meta"),
        ({"weight": torch.ones(2, 4, 4)}, ValueError, "^weight"),
        ({"weight": torch.ones(0, 4)}, ValueError, "^weight"),
        ({"weight": torch.full((4, 4), float("inf"))}, ValueError, "^weight.*infinity"),
        ({"rank": 0}, ValueError, "^rank.*1 to 6"),
        ({"rank": 7}, ValueError, "^rank.*1 to 6"),
        ({"rank": True}, TypeError, "^rank"),
        ({"rank": 2.0}, TypeError, "^rank"),
        ({"sigma": "C"}, ValueError, "^sigma"),
        ({"sign": "w"}, ValueError, "^sign"),
        ({"r_init": "ones"}, ValueError, "^r_init"),
        ({"subspace": "best"}, ValueError, "^subspace"),
        ({"r_std": -1.0}, ValueError, "^r_std"),
        ({"r_std": float("nan")}, ValueError, "^r_std"),
        ({"r_std": "small"}, TypeError, "^r_std"),
        ({"seed": -1}, ValueError, "^seed"),
        ({"seed": 1.5}, TypeError, "^seed"),
        ({"dtype": torch.int32}, TypeError, "^dtype"),
        ({"dtype": "float32"}, TypeError, "^dtype"),
    ],
)
def test_refused_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lxk.lora_xs_factors(**{"weight": W, "rank": 2, **arguments})
