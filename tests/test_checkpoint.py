"""Adapter files: round trips, repaired bases, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loraxs_kernels as lxk
from loraxs_kernels import checkpoint
from tests.models import Net, X, config
from tests.svd.cases import spectrum, with_spectrum


def trained(base: Net, **changes: Any) -> Net:
    net = copy.deepcopy(base)
    lxk.inject_lora_xs(net, config(**changes))
    with torch.no_grad():
        net.classifier.weight.mul_(2.0)
    return net


@pytest.mark.parametrize("embed_bases", [False, True])
@pytest.mark.parametrize("injected", [False, True])
def test_round_trip(tmp_path: Path, embed_bases: bool, injected: bool) -> None:
    base = Net()
    net = trained(base)
    lxk.save_adapter(net, tmp_path, embed_bases=embed_bases)
    fresh = copy.deepcopy(base)
    if injected:
        lxk.inject_lora_xs(fresh, config(seed=3))
    lxk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(X), net(X))


@pytest.mark.filterwarnings("ignore")
def test_signs_and_rotations_of_the_bases_are_repaired(tmp_path: Path) -> None:
    base = Net()
    u, _, vh = torch.linalg.svd(base.value.weight.detach(), full_matrices=False)
    s = torch.linspace(3, 1, 24)
    s[1] = s[2] = s[0]  # a cluster
    with torch.no_grad():
        base.value.weight.copy_(u * s @ vh)
    net = trained(base)
    lxk.save_adapter(net, tmp_path)
    fresh = copy.deepcopy(base)
    lxk.inject_lora_xs(fresh, config())
    flip = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    rotate = torch.block_diag(turn, torch.ones(1, 1))
    with torch.no_grad():
        for layer, T in ((fresh.query, flip), (fresh.value, rotate)):
            assert isinstance(layer, lxk.LoRAXSLinear)
            layer.A.copy_(T @ layer.A)
            layer.B.copy_(layer.B @ T.T)
    lxk.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(X), net(X), rtol=1e-4, atol=1e-4)


def _edit(path: Path, **changes: Any) -> None:
    data = json.loads((path / "adapter.json").read_text())
    data.update(changes)
    (path / "adapter.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", "truncated or was changed"),
        ("changed", "truncated or was changed"),
        ("json", "not JSON"),
        ("version", "version"),
        ("missing", "no adapter.safetensors"),
        ("weights", "base weight of 'query'"),
        ("rank", "rank"),
        ("sigma", "sigma"),
    ],
)
def test_bad_adapters_are_refused(tmp_path: Path, fault: str, message: str) -> None:
    base = Net()
    lxk.save_adapter(trained(base), tmp_path)
    tensors = tmp_path / "adapter.safetensors"
    data = tensors.read_bytes()
    target = copy.deepcopy(base)
    if fault == "truncated":
        tensors.write_bytes(data[:-8])
    elif fault == "changed":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif fault == "json":
        (tmp_path / "adapter.json").write_text("{")
    elif fault == "version":
        _edit(tmp_path, version=99)
    elif fault == "missing":
        tensors.unlink()
    elif fault == "weights":
        with torch.no_grad():
            target.query.weight[0, 0] += 1e-6
    elif fault == "rank":
        lxk.inject_lora_xs(target, config(rank=5))
    elif fault == "sigma":
        lxk.inject_lora_xs(target, config(sigma="B"))
    before = {k: v.clone() for k, v in target.state_dict().items()}
    flags = [p.requires_grad for p in target.parameters()]
    with pytest.raises(ValueError, match=message):
        lxk.load_adapter(target, tmp_path)
    after = target.state_dict()
    assert set(before) == set(after) and all(torch.equal(v, after[k]) for k, v in before.items())
    assert flags == [p.requires_grad for p in target.parameters()]


class Wide(torch.nn.Module):
    """Layers large enough for the randomized methods, with the slow spectrum of real weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.query = torch.nn.Linear(400, 380)
        self.value = torch.nn.Linear(900, 300)
        for layer in (self.query, self.value):
            m, n = layer.weight.shape
            s = spectrum("slow power law", min(m, n), generator)
            layer.weight.data.copy_(with_spectrum(m, n, s, generator))


WIDE = lxk.LoRAXSConfig(rank=8, target_modules=["query", "value"], r_std=0.3)


def test_bases_found_with_another_number_of_threads_are_accepted(tmp_path: Path) -> None:
    base = Wide()
    before = torch.get_num_threads()
    try:
        for here, there in ((1, 2), (2, 1)):
            torch.set_num_threads(here)
            # One layer alone, so that its SVD runs with all the threads.
            layer = lxk.LoRAXSLinear.from_linear(copy.deepcopy(base.query), 8, r_std=0.3)
            net = lxk.inject_lora_xs(copy.deepcopy(base), WIDE)
            saved = net.get_submodule("query")
            assert isinstance(saved, lxk.LoRAXSLinear)
            with torch.no_grad():
                saved.A.copy_(layer.A)
                saved.B.copy_(layer.B)
            lxk.save_adapter(net, tmp_path)
            torch.set_num_threads(there)
            fresh = lxk.load_adapter(copy.deepcopy(base), tmp_path)
            for name in ("query", "value"):
                one, two = net.get_submodule(name), fresh.get_submodule(name)
                assert isinstance(one, lxk.LoRAXSLinear) and isinstance(two, lxk.LoRAXSLinear)
                assert randomized(one.weight)
                difference = (one.delta_weight() - two.delta_weight()).norm()
                assert difference <= 1e-3 * one.delta_weight().norm()
    finally:
        torch.set_num_threads(before)


def randomized(weight: torch.Tensor) -> bool:
    return lxk.randomized_svd(weight, 8).method in ("krylov", "gram-krylov")


@pytest.mark.parametrize("what", ["probe", "rotated bases"])
def test_other_bases_are_refused_with_advice(tmp_path: Path, what: str) -> None:
    base = Wide()
    lxk.save_adapter(lxk.inject_lora_xs(copy.deepcopy(base), WIDE), tmp_path)
    target = copy.deepcopy(base)
    if what == "probe":
        # As if the singular values were right and the vectors those of another matrix.
        data = json.loads((tmp_path / "adapter.json").read_text())
        about = data["modules"]
        about["query"]["probe"] = checkpoint._encode(
            1.01 * checkpoint._decode(about["query"]["probe"], 8, checkpoint._PROBES)
        )
        _edit(tmp_path, modules=about)
    else:
        lxk.inject_lora_xs(target, WIDE)
        layer = target.query
        assert isinstance(layer, lxk.LoRAXSLinear)
        c, s = torch.tensor(0.02).cos(), torch.tensor(0.02).sin()
        turn = torch.block_diag(
            torch.stack([torch.stack([c, s]), torch.stack([-s, c])]), torch.eye(6)
        )
        with torch.no_grad():
            layer.A.copy_(turn @ layer.A)
            layer.B.copy_(layer.B @ turn.T)
    with pytest.raises(ValueError, match=r"bases of 'query'.*embed_bases=True"):
        lxk.load_adapter(target, tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.query.weight.mul_(1.0001)
    with pytest.raises(ValueError, match="base weight of 'query'"):
        lxk.load_adapter(other, tmp_path)


def test_metadata_names_the_svd(tmp_path: Path) -> None:
    lxk.save_adapter(trained(Net()), tmp_path)
    assert json.loads((tmp_path / "adapter.json").read_text())["svd"].endswith("randomized_svd")
