"""Conversion of trained cores: the update stays the same, whatever the conventions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loraxs_kernels as lxk
from loraxs_kernels.__main__ import main
from loraxs_kernels.interop.conventions import CONVENTIONS
from loraxs_kernels.interop.convert import convert, to_lora

RANK, ALPHA = 4, 6.0
LAYERS = ("enc.0.query", "enc.0.dense")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(24, 40)
        self.dense = nn.Linear(40, 24)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.ModuleList([Block()])
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        block: Any = self.enc[0]
        return self.head(block.dense(torch.tanh(block.query(x))))


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def layer_of(net: nn.Module, name: str) -> Any:
    return net.get_submodule(name)


X = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))

#: The table of the conventions once more, as the other libraries' own code has it: the powers of
#: Sigma in A and B, the scale, whose largest entry is positive, the key, what is added to R.
TABLE: dict[str, tuple[float, float, float, str | None, str, float]] = {
    "official": (1, 0, ALPHA / RANK, "u",
                 "base_model.model.{}.default_lora_latent_mapping.weight", 0),
    "aw": (1, 0, ALPHA / RANK, "u", "{}.cores.default.weight", 0),
    "skyrl": (1, 0, ALPHA / RANK, None, "{}.adapter.activation.weight", 0),
    "lora-lite": (1, 0, ALPHA / RANK, None, "{}.lora_R", 0),
    "psoft": (0, 1, 1.0, None, "base_model.model.{}.psoft_R.weight", 1),
    "stable-audio": (0, 0, ALPHA / RANK, "u", "{}.parametrizations.weight.default.M_xs", 0),
    "eigentune": (0, 0, 1.0, "v", "{}.core", 0),
    "clip": (0, 1, ALPHA / math.sqrt(RANK), None, "{}.w_lora_R", 0),
    "rasta": (0.5, 0.5, ALPHA / RANK, None, "{}.R", 0),
    "shformer": (0.5, 0.5, ALPHA / RANK, None, "{}.lora_xs_core", 0),
    "peft": (1, 0, ALPHA / RANK, "u", "base_model.model.{}.lora_R", 0),
    "native": (1, 0, ALPHA / RANK, "u", "{}.R", 0),
}  # fmt: skip


def factors(layer: str, row: str) -> tuple[Tensor, Tensor, float]:
    """A, B and s of a row, in float64."""
    a, b, scale, sign, _, _ = TABLE[row]
    weight = layer_of(base(), layer).weight.detach()
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    _, _, lapack = torch.linalg.svd(weight, full_matrices=False)
    if sign is None:
        flip = (lapack.double() * Vh).sum(1).sign()
    else:
        rows = U.mT if sign == "u" else Vh
        flip = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0].sign()
    U, S, Vh = (U * flip)[:, :RANK], S[:RANK], (flip[:, None] * Vh)[:RANK]
    return S.pow(a)[:, None] * Vh, U * S.pow(b), scale


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("adapter*.safetensors")))


def cores(folder: Path, row: str) -> dict[str, Tensor]:
    *_, key, added = TABLE[row]
    state = tensors(folder)
    return {n: state[key.format(n)] - added * torch.eye(RANK) for n in LAYERS}


def check_same_update(folder: Path, row: str, want: dict[str, Tensor]) -> None:
    for layer, core in cores(folder, row).items():
        A, B, scale = factors(layer, row)
        got = scale * (B @ core.double() @ A)
        # Rounded numbers in R, and in a float32 SVD of the weight, by the bounds for products.
        # R + I rounds what it adds to.
        size = core.abs().double() + (TABLE[row][5] * torch.eye(RANK))
        bound = scale * (B.abs() @ size @ A.abs())
        eps = torch.finfo(torch.float32).eps
        spectrum = 16 * eps * bound.max()
        assert ((got - want[layer]).abs() <= 2 * eps * bound + spectrum).all(), row


@pytest.fixture
def official(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """An official adapter with a trained classifier, and its updates."""
    g = torch.Generator().manual_seed(5)
    folder = tmp_path / "official"
    folder.mkdir()
    state = {
        "base_model.model.head.weight": torch.randn(3, 24, generator=g),
        "base_model.model.head.bias": torch.randn(3, generator=g),
    }
    want = {}
    for layer in LAYERS:
        core = torch.randn(RANK, RANK, generator=g)
        state[TABLE["official"][4].format(layer)] = core
        A, B, scale = factors(layer, "official")
        want[layer] = scale * (B @ core.double() @ A)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA, "r": RANK}))
    return folder, want


@pytest.mark.parametrize("row", list(TABLE))
@pytest.mark.parametrize("ours", ["peft", "native"])
def test_there_and_back(
    tmp_path: Path, official: tuple[Path, dict[str, Tensor]], row: str, ours: str
) -> None:
    if ours == "peft" or row in ("peft", "psoft"):
        pytest.importorskip("peft")
    source, want = official
    there, middle, back = tmp_path / "there", tmp_path / "ours", tmp_path / "back"
    convert(source, there, from_="official", to=row, base=base())
    check_same_update(there, row, want)
    convert(there, middle, from_=row, to=ours, base=base(), to_alpha=ALPHA)
    check_same_update(middle, ours, want)
    convert(middle, back, from_=ours, to=row, base=base())
    check_same_update(back, row, want)
    for a, b in zip(cores(there, row).values(), cores(back, row).values(), strict=True):
        # Twice through float32.
        torch.testing.assert_close(a, b, rtol=4e-7, atol=4e-7)
    head = [v for k, v in tensors(back).items() if k.endswith("head.weight")]
    assert torch.equal(head[0], tensors(source)["base_model.model.head.weight"])


def test_rows_that_agree_need_no_base(
    tmp_path: Path, official: tuple[Path, dict[str, Tensor]]
) -> None:
    source, _ = official
    convert(source, tmp_path / "aw", from_="official", to="aw")
    for a, b in zip(cores(tmp_path / "aw", "aw").values(), cores(source, "official").values(),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_old_scikit_learn_signs(tmp_path: Path, official: tuple[Path, dict[str, Tensor]]) -> None:
    source, _ = official
    convert(source, tmp_path / "v", from_="official", to="official", to_sign="v", base=base())
    convert(tmp_path / "v", tmp_path / "u", from_="official", from_sign="v", to="official",
            base=base())  # fmt: skip
    v, u, first = (cores(f, "official") for f in (tmp_path / "v", tmp_path / "u", source))
    assert all(torch.equal(u[n], first[n]) for n in LAYERS)
    assert all(torch.equal(v[n].abs(), first[n].abs()) for n in LAYERS)
    assert any(not torch.equal(v[n], first[n]) for n in LAYERS)


def test_loaded_by_the_new_owner(tmp_path: Path, official: tuple[Path, dict[str, Tensor]]) -> None:
    peft = pytest.importorskip("peft")
    source, want = official
    expected = merged(want, source)
    for name in ("peft", "psoft", "scalingrl"):
        if name == "psoft" and not hasattr(peft, "PsoftConfig"):
            continue
        convert(source, tmp_path / name, from_="official", to=name, base=base())
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / name)
        assert (loaded(X) - expected).abs().max() <= slack(expected), name
    convert(source, tmp_path / "native", from_="official", to="native", base=base())
    loaded = lxk.load_adapter(base(), tmp_path / "native")
    assert (loaded(X) - expected).abs().max() <= slack(expected)


def slack(y: Tensor) -> float:
    """How far outputs may differ when each library finds the bases itself, in float32.

    A rounding error of the weight turns singular vectors by up to ``eps |W| / gap`` (Wedin 1972).
    """
    turn = 0.0
    for layer in LAYERS:
        S = torch.linalg.svdvals(layer_of(base(), layer).weight.detach().double())[: RANK + 1]
        turn = max(turn, float(S[0] / (S[:-1] - S[1:]).min()))
    return 4 * torch.finfo(torch.float32).eps * turn * float(y.detach().abs().max())


def merged(want: dict[str, Tensor], source: Path) -> Tensor:
    """The output of the base model with the updates in its weights."""
    net = base()
    with torch.no_grad():
        for layer, delta in want.items():
            layer_of(net, layer).weight.add_(delta)
        for name, parameter in net.head.named_parameters():
            parameter.copy_(tensors(source)[f"base_model.model.head.{name}"])
    return net(X)


def test_scalingrl_exports_are_read(
    tmp_path: Path, official: tuple[Path, dict[str, Tensor]]
) -> None:
    source, want = official
    convert(source, tmp_path / "x", from_="official", to="scalingrl", base=base())
    convert(tmp_path / "x", tmp_path / "y", from_="scalingrl", to="official", base=base())
    check_same_update(tmp_path / "y", "official", want)
    state = tensors(tmp_path / "x")
    state["base_model.model.enc.0.query.lora_A.weight"] = torch.randn(RANK, 24)
    save_file(state, tmp_path / "x" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no product of a core"):
        convert(tmp_path / "x", tmp_path / "z", from_="scalingrl", to="official", base=base())


@pytest.mark.parametrize("kind", ["TinyLora", "Psoft"])
def test_peft_methods_are_read(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, f"{kind}Config"):
        pytest.skip(f"PEFT {peft.__version__} has no {kind}")
    common: dict[str, Any] = {"r": RANK, "target_modules": ["query", "dense"]}
    if kind == "TinyLora":
        settings = peft.TinyLoraConfig(u=5, projection_seed=3, **common)
    else:
        settings = peft.PsoftConfig(psoft_alpha=6, **common)
    model = peft.get_peft_model(base(), settings)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    name = kind.lower()
    convert(tmp_path / "theirs", tmp_path / "ours", from_=name, to="native", base=base())
    ours = lxk.load_adapter(base(), tmp_path / "ours")
    assert (ours(X) - model(X)).abs().max() <= slack(model(X))


def test_eigentune_takes_the_cores(
    tmp_path: Path, official: tuple[Path, dict[str, Tensor]]
) -> None:
    eigentune = pytest.importorskip("eigentune")
    source, want = official
    convert(source, tmp_path / "e", from_="official", to="eigentune", base=base())
    net = base()
    settings = eigentune.EigenTuneConfig(
        rank=RANK, method="spectral_core", target_modules=["query", "dense"], backend="torch"
    )
    model = eigentune.get_eigentune_model(net, settings)
    state = tensors(tmp_path / "e")
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    expected = merged(want, source)
    assert (model(X) - expected).abs().max() <= slack(expected)


@pytest.mark.parametrize("from_", ["official", "native", "peft"])
def test_to_lora_is_what_peft_loads(
    tmp_path: Path, official: tuple[Path, dict[str, Tensor]], from_: str
) -> None:
    peft = pytest.importorskip("peft")
    source, want = official
    if from_ != "official":
        convert(source, tmp_path / "in", from_="official", to=from_, base=base())
    else:
        (tmp_path / "in").symlink_to(source)
    to_lora(tmp_path / "in", tmp_path / "lora", from_=from_, base=base())
    saved = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved["target_modules"] == ["dense", "query"]
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert not [n for n, _ in loaded.named_parameters() if "lora_R" in n]
    expected = merged(want, source)
    assert (loaded(X) - expected).abs().max() <= slack(expected)


def test_saved_bases_need_no_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from loraxs_kernels.interop.peft import LoRAXSConfig

    settings = LoRAXSConfig(
        r=RANK, target_modules=["query", "dense"], rank_pattern={"dense": 3}, r_std=0.3,
        embed_bases=True,
    )  # fmt: skip
    model = peft.get_peft_model(base(), settings)
    model.save_pretrained(tmp_path / "in")
    to_lora(tmp_path / "in", tmp_path / "lora", from_="peft")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-5, atol=1e-5)


def lora_sb(folder: Path, spelling: str) -> dict[str, Tensor]:
    """An adapter as LoRA-SB leaves it: orthonormal bases of a gradient, saved; the scale is 1.

    Returns:
        its updates.
    """
    g = torch.Generator().manual_seed(9)
    state, want = {}, {}
    for layer in LAYERS:
        out, inside = layer_of(base(), layer).weight.shape
        gradient = torch.randn(out, inside, generator=g)
        U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
        A, B = Vh[:RANK].contiguous(), U[:, :RANK].contiguous()
        R = torch.diag(S[:RANK]) + 0.1 * torch.randn(RANK, RANK, generator=g)
        prefix = f"base_model.model.{layer}"
        state[f"{prefix}.lora_A.weight"], state[f"{prefix}.lora_B.weight"] = A, B
        state[prefix + spelling] = R
        want[layer] = B.double() @ R.double() @ A.double()
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": RANK}))
    return want


@pytest.mark.parametrize(
    "spelling", ["_lora_latent_mapping.weight", ".default_lora_latent_mapping.weight"]
)
@pytest.mark.parametrize("with_base", [False, True])
def test_lora_sb_with_its_bases_becomes_a_lora(
    tmp_path: Path, spelling: str, with_base: bool
) -> None:
    """Its own A and B count, whatever the base weight; its lora_alpha does not."""
    peft = pytest.importorskip("peft")
    want = lora_sb(tmp_path / "sb", spelling)
    source, folder = tmp_path / "sb", tmp_path / "lora"
    to_lora(source, folder, from_="lora-sb", base=base() if with_base else None)
    loaded = peft.PeftModel.from_pretrained(base(), folder)
    merged = loaded.merge_and_unload()
    eps = torch.finfo(torch.float32).eps
    for layer, delta in want.items():
        weight = layer_of(base(), layer).weight.detach()
        expected = weight.double() + delta
        got = layer_of(merged, layer).weight.detach()
        bound = 8 * RANK * eps * (delta.abs().max() + weight.abs().max())
        assert (got - expected).abs().max() <= bound


def test_lora_sb_without_its_bases_is_refused(tmp_path: Path) -> None:
    """They cannot be found again, so a base weight does not help."""
    lora_sb(tmp_path / "sb", ".default_lora_latent_mapping.weight")
    file = tmp_path / "sb" / "adapter_model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if "enc.0.dense.lora_B" not in k}, file)
    for given in (None, base()):
        with pytest.raises(ValueError, match=r"LoRA-SB.*'enc\.0\.dense'.*gradient estimate"):
            to_lora(tmp_path / "sb", tmp_path / "out", from_="lora-sb", base=given)
        assert not (tmp_path / "out").exists()


def test_command_line(
    tmp_path: Path,
    official: tuple[Path, dict[str, Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, want = official
    save_file(base().state_dict(), tmp_path / "model.safetensors")
    arguments = ["convert", str(source), str(tmp_path / "out"), "--from", "official"]
    arguments += ["--base", str(tmp_path / "model.safetensors")]
    assert main([*arguments, "--to", "eigentune"]) == 0
    check_same_update(tmp_path / "out", "eigentune", want)
    assert main([*arguments, "--to", "lora"]) == 0
    assert "wrote" in capsys.readouterr().out
    lora_sb(tmp_path / "sb", ".default_lora_latent_mapping.weight")
    sb = ["convert", str(tmp_path / "sb"), str(tmp_path / "plain"), "--from", "lora-sb"]
    assert main([*sb, "--to", "lora"]) == 0
    assert len(tensors(tmp_path / "plain")) == 2 * len(LAYERS)
    for wrong in (["--to", "tinylora"], ["--to", "nothing"], ["--to", "lora", "--to-sign", "u"]):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *wrong])
        assert caught.value.code == 2


def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, official: tuple[Path, dict[str, Tensor]]
) -> None:
    source, _ = official
    out = tmp_path / "out"

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            convert(options.pop("source", source), out, **{"from_": "official", **options})
        assert not out.exists()

    refused("TinyLoRA cannot be converted to", to="tinylora")
    refused("LoRA-SB.*cannot be converted to", to="lora-sb")
    refused("LoRA-SB.*cannot be converted from", from_="lora-sb", to="official")
    refused("from_: got 'x'", from_="x", to="official")
    refused("to: got 'x'", to="x")
    refused("base: is needed", to="eigentune")
    refused("base: is needed", to="peft")
    refused("has no key like", from_="eigentune", to="official")
    refused("to_sign: got 'w'", to="official", to_sign="w")
    refused("source: there is no", source=tmp_path / "none.safetensors", to="aw")
    refused("base: the model has no layer", to="eigentune", base=nn.Module())
    refused("base: expected one weight", to="eigentune", base={"a.weight": torch.zeros(2, 2)})
    (source / "adapter_config.json").unlink()
    refused("alpha: got None", to="eigentune", base=base())
    state = {f"a.cores.{r}.weight": torch.zeros(2, 2) for r in ("one", "two")}
    save_file(state, tmp_path / "aw.safetensors")
    refused("route", from_="aw", to="official", source=tmp_path / "aw.safetensors", alpha=1.0)


def test_a_singular_value_of_zero_is_no_divisor(tmp_path: Path) -> None:
    save_file({"a.core": torch.ones(2, 2)}, tmp_path / "core.safetensors")
    with pytest.raises(ValueError, match="singular value of zero"):
        convert(tmp_path / "core.safetensors", tmp_path / "out", from_="eigentune", to="official",
                base={"a.weight": torch.zeros(4, 4)})  # fmt: skip


def test_every_row_has_a_test() -> None:
    assert set(CONVENTIONS) - set(TABLE) == {"lora-sb", "tinylora", "scalingrl"}
