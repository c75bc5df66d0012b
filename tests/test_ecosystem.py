"""PyTorch's own ecosystem over injected transformers: compiler, export, checkpointing, autocast,
per-sample gradients, optimizers, averaging."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loraxs_kernels as lxk

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3))
TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def transformer(kind: str, *, layers: int = 2, **settings: Any) -> nn.Module:
    """A tiny transformer of the ``transformers`` library with an adapter on every linear layer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": layers, "intermediate_size": 64,
        "num_attention_heads": 4, "max_position_embeddings": 32,
    }  # fmt: skip
    model: nn.Module
    if kind == "bert":
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**sizes, **off)
        model = transformers.BertModel(config, add_pooling_layer=False)
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False)
        model = transformers.LlamaForCausalLM(config)
    options = {"target_modules": TARGETS[kind], "r_std": 0.3, **settings}
    return lxk.inject_lora_xs(model, lxk.LoRAXSConfig(4, **options))


def outputs(model: Any, ids: Tensor = IDS) -> Tensor:
    found = model(input_ids=ids)
    return found.logits if "logits" in found else found.last_hidden_state


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(y: Tensor) -> Tensor:
    """A loss that a last LayerNorm does not make constant."""
    probe = torch.arange(y[0].numel(), dtype=y.dtype).sin().view(y.shape[1:])
    return (y * probe).square().mean()


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(y), trained(model)))


def assert_close(got: Any, want: Any) -> None:
    """Equal but for the order of fp32 sums: within 64 eps of the largest value of each tensor."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        a, b = a.detach(), b.detach()
        assert float(b.abs().max()) > 1e-9
        assert float((a - b).abs().max()) <= 64 * torch.finfo(b.dtype).eps * float(b.abs().max())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- torch.compile, torch.export ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {"backend": "aot_eager"}),
        # By default Inductor draws random numbers, and so the seeds of dropout, in its own way.
        ("llama", {"backend": "inductor", "options": {"fallback_random": True}}),
    ],
    ids=["bert-aot_eager", "llama-inductor"],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_whole_transformer_compiles_without_graph_break(kind: str, options: Any) -> None:
    """Outputs and gradients, with dropout: the compiled model draws the same bits."""
    model = transformer(kind, layers=1, dropout=0.2).train()
    compiled = torch.compile(model, fullgraph=True, **options)
    found = []
    for run in (model, compiled, compiled):
        torch.manual_seed(5)
        y = outputs(run)
        found.append([y, *gradients(model, y)])
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    assert not torch.equal(outputs(compiled), found[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.usefixtures("fresh_compiler")
def test_export_round_trip(kind: str, strict: bool) -> None:
    model = transformer(kind, layers=1).eval()
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(
        model, (), {"input_ids": IDS}, strict=strict,
        dynamic_shapes={"input_ids": {0: rows}},
    )  # fmt: skip
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    more = torch.cat([IDS, IDS.flip(1), IDS.flip(0)])
    for ids in (IDS, more):
        assert_close([outputs(loaded, ids)], [outputs(model, ids)])


# ---- activation checkpointing, autocast ---------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_with_dropout(use_reentrant: bool) -> None:
    model = transformer("llama", dropout=0.3).train()
    torch.manual_seed(5)
    y = outputs(model)
    want = [y, *gradients(model, y)]
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    calls = _count_forwards(model)
    torch.manual_seed(5)
    y = outputs(model)
    before = sum(calls)
    loss_of(y).backward()
    assert sum(calls) > 1.5 * before  # it did recompute
    got = [y, *(p.grad for p in trained(model))]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True) if a is not None)


def _count_forwards(model: nn.Module) -> list[int]:
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, lxk.LoRAXSLinear):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_exact_as_eager(dtype: torch.dtype) -> None:
    """Outputs and gradients: at most twice the error of the plain expression under autocast."""
    layer = lxk.LoRAXSLinear(64, 48, 4, r_std=0.3, alpha=3.0)
    x = torch.randn(40, 64, requires_grad=True)

    def plain(x: Tensor) -> Tensor:
        q = F.linear(x, layer.A)
        with torch.autocast("cpu", enabled=False):
            t = (q.float() @ layer.R.T).to(q.dtype)
        return F.linear(x, layer.weight, layer.bias) + layer.scaling * F.linear(t, layer.B)

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            y = f(x)
        assert y.dtype == dtype
        found = [y, *torch.autograd.grad(y.float().square().sum(), (x, layer.R))]
        assert [t.dtype for t in found] == [dtype, torch.float32, torch.float32]
        return found

    wide = copy.deepcopy(layer).double()
    x64 = x.detach().double().requires_grad_()
    y64 = wide(x64)
    truth = [y64, *torch.autograd.grad(y64.square().sum(), (x64, wide.R))]
    peers = run(plain)
    for f in (layer, lambda t: checkpoint(layer, t, use_reentrant=False)):
        for got, peer, true in zip(run(f), peers, truth, strict=True):
            slack = 2 * torch.finfo(dtype).eps * float(true.detach().abs().max())
            error, eager = ((t - true).detach().abs().max() for t in (got, peer))
            assert float(error) <= 2 * float(eager) + slack


# ---- torch.func --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_per_sample_gradients_equal_a_loop(kind: str) -> None:
    """What DP-SGD clips: one gradient of every R for every sample."""
    model = transformer(kind).eval()
    cores = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    rest.update(model.named_buffers())

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids.unsqueeze(0)}
        found = torch.func.functional_call(model, {**values, **rest}, (), inputs)
        return loss_of(found.logits if "logits" in found else found.last_hidden_state)

    ids = torch.cat([IDS, IDS.flip(1)])
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(cores, ids)
    loop = [torch.func.grad(loss)(cores, sample) for sample in ids]
    assert len(cores) == len([m for m in model.modules() if isinstance(m, lxk.LoRAXSLinear)])
    for name, found in per_sample.items():
        assert found.shape == (4, 4, 4)
        assert_close(found, [g[name] for g in loop])


# ---- optimizers, accumulation, clipping, averaging ----------------------------------------------


def _train(model: nn.Module, make: Callable[..., Any], *, chunks: int = 1) -> list[Tensor]:
    """R after three steps; ``chunks``: micro-batches per step."""
    optimizer = make(trained(model))
    for _ in range(3):
        for part in IDS.chunk(chunks):
            (loss_of(outputs(model, part)) / chunks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in trained(model)]


@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_adamw(how: str) -> None:
    flags: dict[str, Any] = {"fused": False, "foreach": False}
    want = _train(transformer("llama"), lambda p: torch.optim.AdamW(p, 1e-2, **flags))
    model = transformer("llama")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = [p.detach().clone() for p in trained(model)]
    got = _train(model, lambda p: torch.optim.AdamW(p, 1e-2, **{**flags, how: True}))
    # Adam divides by the root of a second moment: an entry near zero magnifies rounding.
    for a, b, start in zip(got, want, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert float((b - start).abs().mean()) > 5e-3
    values = dict(model.named_parameters())
    assert all(torch.equal(values[name], kept) for name, kept in frozen.items())


@pytest.mark.slow
@pytest.mark.parametrize("library", ["bitsandbytes.optim", "torchao.optim"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
def test_eight_bit_adamw(library: str) -> None:
    """They quantize states of at least 4096 numbers: R from rank 64 on."""
    optimizers = pytest.importorskip(library)
    torch.manual_seed(0)
    layer = lxk.LoRAXSLinear(128, 96, 64, r_std=0.3)
    peer, x, start = copy.deepcopy(layer), torch.randn(32, 128), layer.R.detach().clone()
    frozen = [t.clone() for t in (layer.weight, layer.A, layer.B)]
    ours = optimizers.AdamW8bit([layer.R], lr=1e-2)
    theirs = torch.optim.AdamW([peer.R], lr=1e-2)
    for _ in range(5):
        for module, optimizer in ((layer, ours), (peer, theirs)):
            loss_of(module(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    kinds = {str(v.dtype) for v in ours.state[layer.R].values() if isinstance(v, Tensor)}
    assert "torch.uint8" in kinds or any("8bit" in type(v).__name__ for v in
                                         ours.state[layer.R].values())  # fmt: skip
    assert all(map(torch.equal, frozen, (layer.weight, layer.A, layer.B)))
    with torch.no_grad():
        assert float((layer.R - peer.R).norm()) < 0.1 * float((peer.R - start).norm()) != 0


def test_gradient_accumulation() -> None:
    sgd = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
    whole = _train(transformer("llama"), sgd)
    assert_close(_train(transformer("llama"), sgd, chunks=2), whole)


@pytest.mark.parametrize("foreach", [False, True])
def test_clip_grad_norm(foreach: bool) -> None:
    model = transformer("bert")
    loss_of(outputs(model)).backward()
    grads = [p.grad.clone() for p in trained(model) if p.grad is not None]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    found = nn.utils.clip_grad_norm_(model.parameters(), float(norm) / 4, foreach=foreach)
    torch.testing.assert_close(found, norm)
    for p, g in zip(trained(model), grads, strict=True):
        torch.testing.assert_close(p.grad, g / 4)


def test_averaged_model() -> None:
    """``swa_utils`` copies the model deeply, caches warm, and averages R over the steps."""
    model = transformer("bert")
    outputs(model)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    start = [p.detach().clone() for p in trained(model)]
    averaged.update_parameters(model)
    moved = _train(model, lambda p: torch.optim.SGD(p, 0.1))
    averaged.update_parameters(model)
    want = [0.9 * a + 0.1 * b for a, b in zip(start, moved, strict=True)]
    assert_close([p.detach() for p in trained(averaged)], want)
    by_hand = transformer("bert")
    with torch.no_grad():
        for p, value in zip(trained(by_hand), want, strict=True):
            p.copy_(value)
    assert_close([outputs(averaged)], [outputs(by_hand)])


# ---- PyTorch's own transformer layers -----------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformer_encoder_in_eval_mode(mask: bool) -> None:
    """In eval mode ``nn.TransformerEncoderLayer`` reads the weights of its linear layers itself."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [4], [3]]) if mask else None
    with torch.no_grad():
        base = model.eval()(x, src_key_padding_mask=padding)
    config = lxk.LoRAXSConfig(4, target_modules=["linear1", "linear2"], r_std=1.0)
    lxk.inject_lora_xs(model, config)
    with torch.no_grad():
        adapted = model(x, src_key_padding_mask=padding)
        want = model.train()(x, src_key_padding_mask=padding)
        keep = slice(None) if padding is None else ~padding
        torch.testing.assert_close(adapted[keep], want[keep])
        assert float((adapted - base).abs().max()) > 0.1
        lxk.eject_lora_xs(model)
        assert torch.equal(model.eval()(x, src_key_padding_mask=padding), base)
