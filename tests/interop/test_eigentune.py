"""EigenTune's layers on this package's backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraxs_kernels.interop import eigentune as ours

eigentune = pytest.importorskip("eigentune")


def layer(dtype: torch.dtype) -> Any:
    from eigentune import EigenTuneConfig, EigenTuneLinear
    from eigentune.svd import Bases

    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(48, 40)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(40, 48, generator=g))
        linear.bias.copy_(torch.randn(40, generator=g))
    u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    bases = Bases(U=u[:, :12], S=s[:12], Vh=vh[:12], indices=tuple(range(12)), fingerprint="")
    config = EigenTuneConfig(rank=12, method="spectral_core")
    made = EigenTuneLinear(linear, bases, config).to(dtype)
    with torch.no_grad():
        made.core.copy_(torch.randn(12, 12, generator=g))
    return made


def run(made: Any, x: Tensor, need_x: bool) -> list[Tensor]:
    leaf = x.to(made.U.dtype).requires_grad_(need_x)
    y = made(leaf)
    wanted = [leaf, made.core] if need_x else [made.core]
    return [y, *torch.autograd.grad(y.square().sum(), wanted)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need_x", [True, False])
def test_results_and_gradients_agree(dtype: torch.dtype, need_x: bool) -> None:
    """At most twice the error of EigenTune's own backend, by the rule of the other tests."""
    x = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    # The same rounded numbers, computed in float64.
    exact = run(layer(dtype).double(), x, need_x)
    theirs = run(layer(dtype), x, need_x)
    got = run(ours.accelerate(layer(dtype)), x, need_x)
    for truth, peer, value in zip(exact, theirs, got, strict=True):
        assert value.dtype == peer.dtype
        slack = 2 * torch.finfo(value.dtype).eps * truth.abs().max()
        assert (value - truth).abs().max() <= 2 * (peer - truth).abs().max() + slack


def test_our_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = ours.Backend.forward

    def counted(self: ours.Backend, *args: object) -> object:
        calls.append(args)
        return forward(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ours.Backend, "forward", counted)
    ours.accelerate(layer(torch.float32))(torch.randn(2, 48))
    assert len(calls) == 1


def test_what_is_not_lora_xs_is_left_to_eigentune() -> None:
    backend = ours.register()
    x = torch.randn(2, 48)
    assert backend.supports(x, 12, "core") and not backend.supports(x, 12, "diag")
    assert not backend.supports(x, 513, "core")
    with pytest.raises(ValueError, match="model"):
        ours.accelerate(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="model"):
        ours.accelerate(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind"):
        backend.forward(x, x, x, x, "diag", x)
