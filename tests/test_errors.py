"""Wrong arguments are named before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loraxs_kernels as lxk
from tests.models import Net, config
from tests.oracle import problem


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 3}, TypeError, "^x:"),
        ({"x": None}, TypeError, "^x:"),
        ({"x": torch.randn(4, 8)}, ValueError, "^x:"),
        ({"x": torch.tensor(1.0)}, ValueError, "^x:"),
        ({"x": torch.zeros(4, 9, dtype=torch.int32)}, TypeError, "^x:"),
        ({"weight": torch.randn(7, 8)}, ValueError, "^weight:"),
        ({"weight": torch.randn(7, 9).double()}, TypeError, "^weight:"),
        ({"weight": torch.randn(7, 9, device="meta")}, ValueError, "^weight:"),
        ({"weight": None}, TypeError, "^weight:"),
        ({"A": torch.randn(3)}, ValueError, "^A:"),
        ({"R": torch.randn(3, 4)}, ValueError, "^R:"),
        ({"R": torch.randn(3, 3).half()}, TypeError, "^R:"),
        ({"R": torch.randn(2, 3, 3)}, ValueError, "^adapter_ids:"),
        ({"B": torch.randn(7, 4)}, ValueError, "^B:"),
        ({"bias": torch.randn(8)}, ValueError, "^bias:"),
        ({"scaling": "1"}, TypeError, "^scaling:"),
        ({"dropout_p": 1.0}, ValueError, "^dropout_p:"),
        ({"backend": "fast"}, ValueError, "^backend:"),
        ({"backend": "triton"}, RuntimeError, "^backend:.*triton"),
        ({"adapter_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, "^adapter_ids:"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {
        "x": torch.randn(4, 9),
        "weight": torch.randn(7, 9),
        "A": torch.randn(3, 9),
        "R": torch.randn(3, 3),
        "B": torch.randn(7, 3),
        "bias": torch.randn(7),
    }
    lxk.lora_xs_linear(**good)
    with pytest.raises(error, match=message):
        lxk.lora_xs_linear(**{**good, **changes})


def test_update_without_base_names_it() -> None:
    with pytest.raises(TypeError, match=r"^base_out:"):
        lxk.lora_xs_update(
            None,  # type: ignore[arg-type]
            torch.randn(4, 9),
            torch.randn(3, 9),
            torch.randn(3, 3),
            torch.randn(7, 3),
        )


def test_a_validated_batch_cannot_be_changed_from_outside() -> None:
    ids = torch.tensor([0, 1, -1])
    batch = lxk.AdapterBatch(ids, 2)
    ids.fill_(99)
    assert batch.ids.tolist() == batch.rows(1).ids.tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.tensor([0, 1, 2, 3]), ValueError),
        (torch.tensor([0, 1, -2, 1]), ValueError),
        (torch.tensor([0, 1]), ValueError),
        (torch.tensor([0.0, 1, 2, 0]), TypeError),
        ([0, 1, 2, 0], TypeError),
        (lxk.AdapterBatch([0, 1, 0, 1], 2), ValueError),
    ],
)
def test_wrong_ids(ids: Any, error: type[Exception]) -> None:
    p = problem(4, 9, 7, 3, adapters=3).to(torch.float32)
    with pytest.raises(error, match="adapter_ids"):
        lxk.lora_xs_linear(p.x, p.weight, p.A, p.R, p.B, adapter_ids=ids)
    with pytest.raises(ValueError, match="base_out"):
        lxk.lora_xs_update(p.x, p.x, p.A, p.R, p.B, adapter_ids=torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank"),
        ({"rank": 2.0}, TypeError, "rank"),
        ({"target_modules": []}, ValueError, "target_modules"),
        ({"target_modules": 3}, TypeError, "target_modules"),
        ({"dropout": 1.5}, ValueError, "dropout"),
        ({"sigma": "C"}, ValueError, "sigma"),
        ({"r_init": "ones"}, ValueError, "r_init"),
        ({"backend": "gpu"}, ValueError, "backend"),
        ({"alpha": "8"}, TypeError, "alpha"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"dropout": "0.1"}, TypeError, "dropout"),
        ({"num_adapters": 0}, ValueError, "num_adapters"),
        ({"num_adapters": True}, TypeError, "num_adapters"),
        ({"prepack": 3}, TypeError, "prepack"),
        ({"rank_pattern": {"query": 0}}, ValueError, "rank_pattern"),
    ],
)
def test_wrong_config(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("ids", "error"),
    [([1.5], TypeError), ([True], TypeError), (["a"], TypeError), ([[1], [1, 2]], ValueError)],
)
def test_wrong_lists_of_ids(ids: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^ids:"):
        lxk.AdapterBatch(ids, 3)
    assert lxk.AdapterBatch([[0, 1], [-1, 2]], 3).ids.tolist() == [[0, 1], [-1, 2]]


@pytest.mark.parametrize("call", ["eject", "save", "load", "use"])
def test_models_that_are_none(call: str, tmp_path: Path) -> None:
    net = Net()
    lxk.inject_lora_xs(net, config())
    lxk.save_adapter(net, tmp_path)
    calls: dict[str, Callable[[Any], Any]] = {
        "eject": lxk.eject_lora_xs,
        "save": lambda model: lxk.save_adapter(model, tmp_path),
        "load": lambda model: lxk.load_adapter(model, tmp_path),
        "use": lambda model: lxk.use_adapters(model, [0]).__enter__(),
    }
    with pytest.raises(TypeError, match=r"^model:"):
        calls[call](3)
    with pytest.raises(ValueError, match=r"model|target_modules"):
        calls[call](torch.nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("weight", "rank", "error", "message"),
    [
        (torch.full((4, 4), float("nan")), 2, ValueError, "weight.*NaN"),
        (torch.randn(4, 4), 5, ValueError, "rank"),
        (torch.randn(4), 1, ValueError, "weight"),
        (torch.zeros(0, 4), 1, ValueError, "weight"),
        (torch.ones(4, 4, dtype=torch.int64), 1, TypeError, "weight"),
    ],
)
def test_wrong_weights(weight: Tensor, rank: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lxk.lora_xs_factors(weight, rank)
