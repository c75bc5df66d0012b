"""CUDA graphs: what a capture may not do, and what a replay may not change.

Without a GPU: the operands' data is never read, sizes never depend on it, and nothing but
allocations is asked of PyTorch while launches are captured; the captured launches, executed from
their PTX on the very buffers of the capture, give the bits of eager launches, again and again. The
last tests capture and replay on a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)

import loraxs_kernels as lxk
from loraxs_kernels.backends import flags
from loraxs_kernels.backends import triton as backend
from loraxs_kernels.backends.triton import launch
from loraxs_kernels.backends.triton.specialise import POINTERS, Specialisation
from tests import oracle
from tests.triton_ptx import READONLY, Device, install, small_plan

BF16 = torch.bfloat16
GPU = torch.device("cuda", 0)

#: All that may reach PyTorch during a capture besides the launches.
ALLOCATIONS = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default,
    torch.ops.aten.fill_.Scalar,  # the tests' own NaN in fresh memory
    torch.ops.aten.full.default,  # the flags
}  # fmt: skip
VIEWS = {
    torch.ops.aten.transpose.int, torch.ops.aten.t.default, torch.ops.aten.detach.default,
    torch.ops.aten.select.int, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default,
}  # fmt: skip


class OnlyAllocations(TorchDispatchMode):
    """Refuses every operation that computes or reads; keeps the sizes of what is allocated.

    The flag of bad adapter ids may be read: it lies in the host's memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            on_host = {held.data_ptr() for held in flags._bad_ids.values()}
            assert args[0].data_ptr() in on_host, "a tensor's data was read: a synchronisation"
        else:
            assert func in ALLOCATIONS | VIEWS, f"{func} during a capture"
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS and func is not torch.ops.aten.fill_.Scalar:
            self.allocated.append((tuple(result.shape), result.dtype))
        return result


@dataclass
class GraphDevice(Device):
    """A device that executes launches, or keeps them while a capture is on, to be replayed.

    ``nodes``: what was captured, in order. ``memory``: what those launches may write.
    """

    capturing: bool = False
    nodes: list[Callable[[], object]] = field(default_factory=list)
    memory: dict[int, Tensor] = field(default_factory=dict)

    def load(self, spec: Specialisation, device: torch.device) -> Callable[..., None]:
        execute = super().load(spec, device)

        def launched(grid: int, pointers: list[Tensor | None], *rest: Any) -> None:
            if not self.capturing:
                execute(grid, pointers, *rest)
                return
            self.nodes.append(functools.partial(execute, grid, pointers, *rest))
            for name, t in zip(POINTERS, pointers, strict=True):
                if t is not None and name not in READONLY and name != "bad_ptr":
                    self.memory[t.data_ptr()] = t

        return launched

    def zeros(self, size: int, **options: Any) -> Tensor:
        """``torch.zeros`` for flags; captured, it is a node, and the memory holds anything."""
        made = torch.full((size,), 0x5A5A5A5A, dtype=torch.int32)
        if self.capturing:
            self.nodes.append(made.zero_)
        else:
            made.zero_()
        return made

    def replay(self) -> None:
        """Execute what was captured, in memory that others have used meanwhile."""
        for t in self.memory.values():
            t.fill_(float("nan") if t.is_floating_point() else 0x5A5A5A5A)
        for node in self.nodes:
            node()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[GraphDevice]:
    """Launches go to a :class:`GraphDevice`, flags come from where they do on a GPU."""
    made = GraphDevice()
    install(monkeypatch, made)
    store = flags.flags
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(flags, "_by_stream", {})
    monkeypatch.setattr(flags, "_by_capture", {})
    monkeypatch.setattr(flags, "flags", lambda _, count: store(GPU, count))
    monkeypatch.setattr(flags, "torch", SimpleNamespace(
        zeros=lambda size, **options: made.zeros(size, **options), int32=torch.int32,
        cuda=SimpleNamespace(
            current_stream=lambda index: stream,
            is_current_stream_capturing=lambda: made.capturing,
        ),
    ))  # fmt: skip
    monkeypatch.setattr(flags, "_capture_id", lambda stream: 1)
    monkeypatch.setattr(flags, "bad_ids", lambda _: _bad_ids(flags._bad_ids))
    monkeypatch.setattr(flags, "_bad_ids", {})
    yield made
    for held in flags._by_stream.values():
        assert not held.any(), "a launch left flags behind"


def _bad_ids(store: dict[int, Tensor]) -> Tensor:
    if 0 not in store:
        store[0] = torch.zeros(1, dtype=torch.int32)
    return store[0]


NAMES = ("y", "q", "dx", "dR", "db")


@dataclass
class Layer:
    """The buffers of one layer, whose values change and whose addresses do not."""

    t: dict[str, Tensor]

    @classmethod
    def made(cls, seed: int, adapters: int | None, dropout: bool) -> Layer:
        p = oracle.problem(70, 40, 72, 16, adapters=adapters, seed=seed).to(BF16, torch.float32)
        found = {name: getattr(p, name) for name in ("x", "R", "grad_y")}
        same = oracle.problem(70, 40, 72, 16, adapters=adapters).to(BF16, torch.float32)
        found |= {name: getattr(same, name) for name in ("weight", "A", "B", "bias")}
        if p.ids is not None:
            found["ids"] = p.ids
        if dropout:
            found["seed"] = torch.tensor([1234567 + seed])
        return cls(found)

    def take(self, other: Layer) -> None:
        for name, value in self.t.items():
            value.copy_(other.t[name])

    def run(self) -> dict[str, Tensor]:
        t, p = self.t, 0.3 if "seed" in self.t else 0.0
        seed, ids = t.get("seed"), t.get("ids")
        y, q = backend.forward(
            t["x"], t["weight"], None, t["A"], t["R"], t["B"], t["bias"], seed, ids, None, None,
            0.7, p, 0,
        )  # fmt: skip
        rest = backend.backward(
            t["grad_y"], q, t["weight"], t["A"], t["R"], t["B"], seed, ids, None, None,
            0.7, p, True, True, True, 0,
        )  # fmt: skip
        return dict(zip(NAMES, (y, q, *rest), strict=True))


def _copies(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in found.items()}


def _same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return all(torch.equal(got[name], want[name]) for name in NAMES)


CASES = [
    (80, "ride-along", None, False),
    (80, "resident", None, True),
    (90, "ticket", 3, False),
]


@pytest.mark.parametrize(("arch", "scheme", "adapters", "dropout"), CASES)
def test_a_replay_computes_what_an_eager_launch_does(
    device: GraphDevice, arch: int, scheme: str, adapters: int | None, dropout: bool
) -> None:
    """With other inputs, adapter ids and dropout seed in the captured buffers each time."""
    device.arch = arch
    plan = small_plan(scheme, 16, chunks=2)
    launch.plan_override = lambda problem, gpu: plan
    inputs = [Layer.made(seed, adapters, dropout) for seed in (1, 2)]
    eager = [_copies(layer.run()) for layer in inputs]
    assert not any(torch.equal(eager[0][name], eager[1][name]) for name in NAMES if name != "db")

    held = Layer.made(1, adapters, dropout)
    device.capturing = True
    with OnlyAllocations():
        out = held.run()
    device.capturing = False
    launches = [n for n in device.nodes if isinstance(n, functools.partial)]
    assert len(launches) == 2, "one launch in each direction"

    for which in (1, 0):
        held.take(inputs[which])
        device.replay()
        assert _same_bits(out, eager[which])
    # Eager work between two replays neither disturbs them nor is disturbed.
    assert _same_bits(inputs[1].run(), eager[1])
    device.replay()
    assert _same_bits(out, eager[0])


def test_flags_of_a_capture_are_its_own(device: GraphDevice) -> None:
    plan = small_plan("ticket", 16, chunks=2)
    launch.plan_override = lambda problem, gpu: plan
    layer = Layer.made(1, None, False)
    layer.run()
    of_stream = {t.data_ptr() for t in flags._by_stream.values()}
    device.capturing = True
    layer.run()
    of_capture = {t.data_ptr() for t in flags._by_capture.values()}
    assert len(of_stream) == len(of_capture) == 1 and not of_stream & of_capture
    used = {n.args[1][POINTERS.index("flags_ptr")].data_ptr()
            for n in device.nodes if isinstance(n, functools.partial)}  # fmt: skip
    assert used == of_capture
    # Zeroed by a node before the first launch that uses them, on every replay.
    assert not isinstance(device.nodes[0], functools.partial)
    # A second capture gets others: both graphs may be replayed side by side.
    flags._capture_id = lambda stream: 2
    layer.run()
    assert len({t.data_ptr() for t in flags._by_capture.values()} - of_capture) == 1
    device.capturing = False
    layer.run()
    assert not flags._by_capture  # the graphs' memory pools own them now


@pytest.mark.parametrize("adapters", [None, 3])
def test_sizes_do_not_depend_on_data(device: GraphDevice, adapters: int | None) -> None:
    """The allocations and launches of a call are those of any other call of its shapes."""
    plan = small_plan("ticket", 16, chunks=2)
    launch.plan_override = lambda problem, gpu: plan
    device.capturing = True
    Layer.made(0, adapters, False).run()  # prepares, and allocates the flags of this capture
    seen = []
    for seed in (1, 2, 3):
        layer = Layer.made(seed, adapters, False)
        if seed == 3:
            layer.t["x"].fill_(float("nan"))
            if adapters:
                layer.t["ids"].fill_(99)
        device.nodes.clear()
        with OnlyAllocations() as mode:
            layer.run()
        notes = [n for n in device.nodes if isinstance(n, functools.partial)]
        seen.append((mode.allocated, [(n.args[0], n.args[2:]) for n in notes]))
    assert seen[0][0] and seen[0] == seen[1] == seen[2]


def test_the_mode_notices_a_synchronisation() -> None:
    x = torch.ones(3)
    with OnlyAllocations(), pytest.raises(AssertionError, match="synchronisation"):
        bool(x[0])
    with OnlyAllocations(), pytest.raises(AssertionError, match=r"aten\.nonzero"):
        x.nonzero()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_nothing_above_the_backend_reads_data(per_row: bool, p: float) -> None:
    """Tensors on a GPU that are not there: reading one, or a size that follows from data, raises.

    Both directions, from the public function on.
    """
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=GPU, requires_grad=grad)

        x, W, A, B = empty(10, 24, grad=True), empty(40, 24), empty(4, 24), empty(40, 4)
        bias = empty(40, grad=True)
        R = empty(*((3,) if per_row else ()), 4, 4, dtype=torch.float32, grad=True)
        ids = empty(10, dtype=torch.int64) if per_row else None
        y = lxk.lora_xs_linear(x, W, A, R, B, bias, dropout_p=p, adapter_ids=ids)
        assert y.device == GPU and y.shape == (10, 40) and y.grad_fn is not None
        found = y.grad_fn.apply(torch.empty_like(y), None)  # type: ignore[attr-defined]
    shapes = [g.shape for g in found if g is not None]
    assert shapes == [x.shape, R.shape, bias.shape]


# -------------------------------------------------------------------------------- on a GPU

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def _gpu_step(dtype: torch.dtype, adapters: int | None, p: float) -> tuple[Any, dict[str, Tensor]]:
    """A call that runs one layer forward and backward, and the buffers that it reads."""
    torch.manual_seed(0)
    layer = lxk.LoRAXSLinear(200, 136, 12, r_std=0.3, dropout=p, num_adapters=adapters)
    layer = layer.to("cuda", dtype).train()
    x = torch.randn(96, 200, device="cuda", dtype=dtype, requires_grad=True)
    G = torch.randn(96, 136, device="cuda", dtype=dtype)
    held = {"x": x, "G": G, "R": layer.R}
    if adapters is not None:
        held["ids"] = torch.randint(-1, adapters, (96,), device="cuda")

    def step() -> list[Tensor]:
        y = layer(x, adapter_ids=held.get("ids")) if adapters is not None else layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, layer.R), G)]

    return step, held


def _captured(step: Callable[[], list[Tensor]]) -> tuple[Any, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("adapters", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_capture_and_replay_on_a_gpu(dtype: torch.dtype, adapters: int | None) -> None:
    step, held = _gpu_step(dtype, adapters, 0.0)
    graph, out = _captured(step)
    for seed in range(3):
        g = torch.Generator(device="cuda").manual_seed(seed)
        with torch.no_grad():
            for name, value in held.items():
                if name == "ids":
                    value.random_(-1, adapters, generator=g)
                else:
                    value.normal_(generator=g)
        want = [t.clone() for t in step()]
        for t in out:
            t.fill_(float("nan"))
        graph.replay()
        graph.replay()
        step()  # eager work on the same stream beside it
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


@pytest.mark.gpu
@no_gpu
def test_dropout_in_a_graph_on_a_gpu() -> None:
    """Each replay draws another mask; the seed of the generator decides which."""
    graph, out = _captured(_gpu_step(torch.float32, None, 0.4)[0])
    found = []
    for seed in (5, None, 5):
        if seed is not None:
            torch.cuda.manual_seed(seed)
        graph.replay()
        torch.cuda.synchronize()
        found.append([t.clone() for t in out])
    assert not torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("adapters", [None, 5])
def test_no_synchronisation_on_a_gpu(adapters: int | None) -> None:
    step, _ = _gpu_step(torch.bfloat16, adapters, 0.3)
    step()  # the first call may load and compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
