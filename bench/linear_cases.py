"""What ``bench_linear`` times: the cases, and one callable per contender for each of them.

Every contender computes the same thing from the same numbers (:func:`check_agreement` sees to it),
except the bare layers, which leave the adapter out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraxs_kernels import LoRAXSLinear

#: ``tf32`` is a way of multiplying float32 that only GPUs have.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
}
CPU_DTYPES = ("fp32", "bf16", "fp16")
PASSES = ("fwd", "fwdbwd")

#: (in, out) of linear layers in real models, and whether they have a bias.
MODELS: dict[str, dict[tuple[int, int], bool]] = {
    "minilm": {(384, 384): True, (384, 1536): True, (1536, 384): True},
    "roberta-large": {(1024, 1024): True, (1024, 4096): True},
    "mistral-7b": {(4096, 4096): False, (4096, 14336): False},
    "llama-8b": {(4096, 1024): False, (4096, 4096): False, (14336, 4096): False},
    "smollm2-135m": {(576, 576): False, (576, 1536): False},
    "smollm2-1.7b": {(2048, 2048): False, (2048, 8192): False},
}

#: The models whose layers are the default list on a CPU.
DEFAULT_MODELS = ("minilm", "roberta-large", "mistral-7b")

#: Above this much work (rows * in * out) a case runs only when its shape or rows are asked for.
LARGEST = 512 * 4096 * 4096

#: Relative error (Frobenius) that contenders may differ by, for the same sums in another order.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2, "tf32": 1e-2}

Call = Callable[[], Any]
#: One pass of a contender over given x and dL/dy.
Step = Callable[[Tensor, Tensor], Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    in_features: int
    out_features: int
    rows: int
    rank: int
    dtype: str
    what: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    @property
    def trains(self) -> bool:
        """Whether the backward pass belongs to the case."""
        return self.what == "fwdbwd"

    @property
    def flop_tax(self) -> float:
        """Arithmetic of layer and adapter over that of the layer alone.

        Forward: A, R and B. Backward: Bᵀ, Rᵀ, Aᵀ and dR, hence 2 r² there; beside dx, as W is
        frozen.
        """
        base = self.in_features * self.out_features
        bases = self.rank * (self.in_features + self.out_features)
        core = self.rank**2
        if self.trains:
            return 1 + (2 * bases + 3 * core) / (2 * base)
        return 1 + (bases + core) / base

    @property
    def flops(self) -> float:
        """Floating-point operations of layer and adapter."""
        products = 2 if self.trains else 1
        return 2.0 * products * self.rows * self.in_features * self.out_features * self.flop_tax

    @property
    def slug(self) -> str:
        """The case as part of a file's name."""
        return (
            f"{self.in_features}x{self.out_features}-m{self.rows}-r{self.rank}"
            f"-{self.dtype}-{self.what}"
        )

    def __str__(self) -> str:
        return (
            f"{self.in_features}→{self.out_features} M={self.rows} r={self.rank} "
            f"{self.dtype} {self.what}"
        )


class EagerLoRAXS(nn.Module):
    """LoRA-XS as PEFT and the official code run it: four linear layers and a scaled sum."""

    def __init__(self, base: nn.Linear, A: Tensor, R: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        (rank, in_features), out_features = A.shape, B.shape[0]
        self.base = base
        self.lora_A = nn.Linear(in_features, rank, bias=False, device="meta")
        self.lora_R = nn.Linear(rank, rank, bias=False, device="meta")
        self.lora_B = nn.Linear(rank, out_features, bias=False, device="meta")
        self.lora_A.weight = nn.Parameter(A, requires_grad=False)
        self.lora_R.weight = nn.Parameter(R.clone())
        self.lora_B.weight = nn.Parameter(B, requires_grad=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        return result + self.lora_B(self.lora_R(self.lora_A(x))) * self.scaling


class Weights:
    """A frozen layer and its packed copies, shared by the cases of one shape and dtype."""

    def __init__(self, shape: tuple[int, int], dtype: str, device: str = "cpu") -> None:
        torch.manual_seed(0)
        has_bias = {s: b for model in MODELS.values() for s, b in model.items()}.get(shape, True)
        self.linear = nn.Linear(*shape, bias=has_bias, dtype=DTYPES[dtype], device=device)
        self.linear.requires_grad_(False)
        self._packed: dict[tuple[bool, int | None], Tensor] = {}

    def packed(self, transposed: bool, rows: int | None, dtype: torch.dtype) -> Tensor:
        """The weight reordered by oneDNN; ``rows``: for that many rows, ``None``: for any."""
        key = (transposed, rows)
        if key not in self._packed:
            # Those for one number of rows are not needed again once the rows change.
            stale = [k for k in self._packed if k[1] is not None and k[1] != rows]
            for k in stale:
                del self._packed[k]
            weight = self.linear.weight.detach().to(dtype)
            weight = weight.t() if transposed else weight
            self._packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        return self._packed[key]


def _native(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies ``dtype`` on this processor without going through float32."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def work_dtype(dtype: str) -> str:
    """The dtype in which this processor multiplies ``dtype``."""
    return dtype if _native(DTYPES[dtype]) else "fp32"


class Operands:
    """The inputs of one case, the same for every contender."""

    def __init__(self, case: Case, linear: nn.Linear, device: str = "cpu") -> None:
        self.generator = torch.Generator(device).manual_seed(1)
        self.linear, self.dtype, self.device = linear, DTYPES[case.dtype], device
        rank = case.rank
        self.x = self.normal(case.rows, case.in_features).to(self.dtype)
        self.grad_y = self.normal(case.rows, case.out_features).to(self.dtype)
        # Of a size at which a wrong adapter shows in y.
        self.A = (self.normal(rank, case.in_features) / case.in_features**0.5).to(self.dtype)
        self.B = (self.normal(case.out_features, rank) / rank**0.5).to(self.dtype)
        self.R = self.normal(rank, rank) / rank**0.5

    def normal(self, *size: int) -> Tensor:
        """Standard normal float32 numbers, the same in every run on the same kind of device."""
        return torch.randn(*size, generator=self.generator, device=self.device)


def step(case: Case, layer: Callable[[Tensor], Tensor], trained: Iterable[Tensor]) -> Step:
    """``y``, or the gradients of x and of what trains; the caller has set the grad mode."""
    if not case.trains:
        return lambda x, grad_y: layer(x)
    leaves = list(trained)
    return lambda x, grad_y: torch.autograd.grad(layer(x), [x, *leaves], grad_y)


def _run(case: Case, ops: Operands, layer: Callable[[Tensor], Tensor], core: Tensor) -> Call:
    """One pass over the case's own inputs."""
    one = step(case, layer, [core])
    x = ops.x.detach().clone().requires_grad_() if case.trains else ops.x
    return lambda: one(x, ops.grad_y)


def bare(case: Case, ops: Operands, weights: Weights) -> dict[str, Call]:
    """The layer alone, by raw products: without autograd, hence the hardest to keep up with."""
    W, b = ops.linear.weight.detach(), ops.linear.bias
    x, g = ops.x, ops.grad_y

    def plain() -> tuple[Tensor, ...]:
        return (F.linear(x, W, b), g @ W) if case.trains else (F.linear(x, W, b),)

    calls: dict[str, Call] = {"bare plain": plain}
    dtype = DTYPES[case.dtype]
    work = dtype if _native(dtype) else torch.float32
    bias = None if b is None else b.detach().to(work)
    linear = torch.ops.mkldnn._linear_pointwise.default

    def packed(rows: int | None) -> Call:
        forward = weights.packed(False, rows, work)
        backward = weights.packed(True, rows, work) if case.trains else None

        def call() -> tuple[Tensor, ...]:
            y = linear(x.to(work), forward, bias, "none", [], "").to(dtype)
            if backward is None:
                return (y,)
            return y, linear(g.to(work), backward, None, "none", [], "").to(dtype)

        return call

    # oneDNN may choose another layout when it is told the number of rows; the faster one counts.
    calls["bare packed"] = packed(None)
    calls["bare packed for M"] = packed(case.rows)
    return calls


def ours_layer(case: Case, ops: Operands, backend: str | None = None) -> LoRAXSLinear:
    """Our layer with the case's bases and core."""
    bases = (ops.A, ops.B, torch.ones(case.rank, device=ops.device))
    layer = LoRAXSLinear.from_linear(ops.linear, case.rank, bases=bases, backend=backend)
    with torch.no_grad():
        layer.R.copy_(ops.R)
    return layer


def eager_layer(case: Case, ops: Operands) -> EagerLoRAXS:
    """The eager layer, its core in x's dtype."""
    return EagerLoRAXS(ops.linear, ops.A, ops.R.to(DTYPES[case.dtype]), ops.B, 1.0)


def eigentune_layer(case: Case, ops: Operands) -> Any:
    """EigenTune's layer of the same form; ``ImportError`` where it is not installed."""
    from eigentune import EigenTuneConfig, EigenTuneLinear
    from eigentune.svd import Bases

    config = EigenTuneConfig(rank=case.rank, method="spectral_core")
    ones = torch.ones(case.rank, device=ops.device)
    bases = Bases(U=ops.B, S=ones, Vh=ops.A, indices=tuple(range(case.rank)), fingerprint="")
    layer = EigenTuneLinear(ops.linear, bases, config)
    with torch.no_grad():
        layer.core.copy_(ops.R)
    return layer


def _compiled(case: Case, ops: Operands) -> Call:
    # A cache full of other cases makes Dynamo run eagerly without a word.
    torch.compiler.reset()
    eager = eager_layer(case, ops)
    compiled = torch.compile(eager, dynamic=False, fullgraph=True)
    call = _run(case, ops, compiled, eager.lora_R.weight)
    call()
    return call


def _eigentune(case: Case, ops: Operands) -> Call:
    layer = eigentune_layer(case, ops)
    call = _run(case, ops, layer, layer.core)
    call()
    return call


def reason(error: BaseException) -> str:
    """Why a contender does not take part, in one line."""
    if isinstance(error, ImportError):
        return "not installed"
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line[:150]}"


def attempt(makers: Mapping[str, Callable[[], T]]) -> tuple[dict[str, T], dict[str, str]]:
    """``(made, skipped)``: what could be made, and why the rest could not."""
    made: dict[str, T] = {}
    skipped: dict[str, str] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            skipped[name] = reason(error)
    return made, skipped


def contenders(
    case: Case, weights: Weights, *, with_compile: bool
) -> tuple[dict[str, Call], dict[str, str]]:
    """``(calls, skipped)``: what to time by name, and why a contender is not among it.

    To be called, and its calls run, with the grad mode of the case.
    """
    ops = Operands(case, weights.linear)
    ours, eager = ours_layer(case, ops), eager_layer(case, ops)
    calls: dict[str, Call] = {"ours": _run(case, ops, ours, ours.R)}
    calls |= bare(case, ops, weights)
    calls["eager"] = _run(case, ops, eager, eager.lora_R.weight)
    optional: dict[str, Callable[[], Call]] = {"eigentune": lambda: _eigentune(case, ops)}
    if with_compile:
        optional["compile"] = lambda: _compiled(case, ops)
    made, skipped = attempt(optional)
    return calls | made, skipped


def check_agreement(case: Case, calls: Mapping[str, Call]) -> None:
    """See that all contenders with an adapter compute the same: a benchmark of equals.

    Raises:
        RuntimeError: one differs from the eager layer.
    """
    expected = _tensors(calls["eager"]())
    for name, call in calls.items():
        if name == "eager" or name.startswith("bare"):
            continue
        check_equal(f"{case}: {name}", _tensors(call()), expected, TOLERANCE[case.dtype])


def check_equal(
    what: str, results: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float
) -> None:
    """Compare in the Frobenius norm, relative to ``expected``.

    Raises:
        RuntimeError: a tensor is further off than ``tolerance``, or holds NaN.
    """
    for got, want in zip(results, expected, strict=True):
        norm = _norm(want, None)
        error = _norm(got, want) / (norm or 1.0)
        if not error <= tolerance:
            raise RuntimeError(f"{what} differs from eager, relative error {error:.1e}")


def _norm(tensor: Tensor, other: Tensor | None) -> float:
    """Frobenius norm of ``tensor``, or of its difference to ``other``, without large copies."""
    total, step = 0.0, 4096
    for start in range(0, tensor.shape[0], step):
        part = tensor[start : start + step].double()
        if other is not None:
            part = part - other[start : start + step].double()
        total += float(part.square().sum())
    return total**0.5


def _tensors(result: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


# ---------------------------------------------------------------------------------- which cases


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """``"minilm,1024x4096"`` (model names, or IN x OUT) as pairs.

    Raises:
        ValueError: an item is neither.
    """
    shapes: list[tuple[int, int]] = []
    for item in text.split(","):
        if item in MODELS:
            shapes += MODELS[item]
            continue
        sizes = item.lower().replace("→", "x").split("x")
        if len(sizes) != 2 or not all(s.isdigit() and int(s) > 0 for s in sizes):
            raise ValueError(f"shapes: got {item!r}, expected INxOUT or one of {', '.join(MODELS)}")
        shapes.append((int(sizes[0]), int(sizes[1])))
    return shapes


def bar_cases() -> list[Case]:
    """The cases for which the project names the time it demands."""
    points = [((4096, 4096), m) for m in (512, 1, 16)] + [((1024, 1024), m) for m in (512, 2048)]
    return [
        Case(*shape, rows, rank, "fp32", what)
        for shape, rows in points
        for rank in (16, 64)
        for what in PASSES
    ]


def quick_cases() -> list[Case]:
    """A few cases, for a look within a minute."""
    points = [((384, 384), m) for m in (1, 128)] + [((1024, 1024), m) for m in (16, 512)]
    points.append(((4096, 4096), 16))
    return [Case(*shape, rows, 16, "fp32", what) for shape, rows in points for what in PASSES] + [
        Case(1024, 1024, 128, 64, "bf16", what) for what in PASSES
    ]


def profiled_cases() -> list[Case]:
    """What ``--profile`` looks at unless cases are asked for."""
    return [Case(1024, 1024, 512, 16, "fp32", what) for what in PASSES]


def select(
    shapes: list[tuple[int, int]] | None,
    ranks: list[int] | None,
    rows: list[int] | None,
    dtypes: list[str] | None,
    passes: list[str] | None,
) -> list[Case]:
    """The cases of a run; ``None``: the default list, thinned so that a run takes minutes.

    Thinned means: ranks 4 and 256 only at 512 rows, bf16 only at rank 16, nothing above
    :data:`LARGEST`. The cases of the bar come first, the rest sorted by shape.
    """
    cases = [
        Case(*shape, m, r, dtype, what)
        for shape in shapes or [s for model in DEFAULT_MODELS for s in MODELS[model]]
        for dtype in dtypes or ("fp32", "bf16")
        for m in rows or (1, 16, 128, 512, 2048, 4096)
        for r in ranks or (4, 16, 64, 256)
        for what in passes or PASSES
    ]

    def kept(case: Case) -> bool:
        if ranks is None:
            few = (16,) if case.dtype != "fp32" else (16, 64)
            common = few + ((4, 256) if case.rows == 512 and case.dtype == "fp32" else ())
            if case.rank not in common:
                return False
        asked = shapes is not None or rows is not None
        return asked or case.rows * case.in_features * case.out_features <= LARGEST

    cases = [case for case in cases if kept(case) and case.rank <= min(case.shape)]
    bar = set(bar_cases())
    return sorted(cases, key=lambda case: case not in bar)


def wants_compile(case: Case) -> bool:
    """The small subset for which ``torch.compile`` runs by default: compiling takes seconds."""
    point = (case.shape, case.rows)
    return (
        case.rank == 16
        and case.dtype == "fp32"
        and point in (((1024, 1024), 16), ((1024, 1024), 512), ((384, 1536), 128))
    )
