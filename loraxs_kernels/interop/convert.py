"""Trained cores from the conventions of one implementation to those of another, exactly.

With ``A = Sigma^a V^T`` and ``B = U Sigma^b``, ``s B R A`` is the same update for::

    R' = D Sigma^(b - b') R Sigma^(a - a') D * s / s'

where D has the signs by which the singular vectors differ. The table is in ``conventions``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from loraxs_kernels.factors import SIGNS, fold_to_lora
from loraxs_kernels.interop import _cores, _written
from loraxs_kernels.interop._cores import Base, Cores
from loraxs_kernels.interop.conventions import CONVENTIONS, POWERS, SCALES, Convention, convention

BaseSource = nn.Module | Mapping[str, Tensor] | str | Path


def _converted(
    cores: Cores, layer: str, target: Convention, scale: float, base: Base | None
) -> Tensor:
    """R' of one layer."""
    R, row = cores.R[layer], cores.row
    factor = cores.scaling[layer] / scale
    same_signs = row.sign == target.sign and layer not in cores.bases
    if row.sigma == target.sigma and same_signs:
        return R * factor
    if base is None:
        raise ValueError(
            f"base: is needed: {row.library} has Sigma in {row.sigma!r} and sign rule "
            f"{row.sign!r}, {target.library} in {target.sigma!r} and {target.sign!r}"
        )
    rank = len(R)
    _, S, _ = base.svd(layer, rank)
    D = _cores.signs(row, layer, base, rank, cores.bases.get(layer))
    D = D * _cores.signs(target, layer, base, rank)
    (a, b), (a_, b_) = POWERS[row.sigma], POWERS[target.sigma]
    if min(a - a_, b - b_) < 0 and bool((S <= 0).any()):
        raise ValueError(
            f"base: {layer!r} has a singular value of zero, which cannot be divided by"
        )
    left, right = D * S.pow(b - b_), D * S.pow(a - a_)
    return left[:, None] * R * right[None, :] * factor


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    from_: str,
    to: str,
    base: BaseSource | None = None,
    alpha: float | None = None,
    to_alpha: float | None = None,
    from_sign: str | None = None,
    to_sign: str | None = None,
    route: str | None = None,
    transposed: bool = False,
) -> None:
    """Write an adapter of one implementation as one of another, with the same update.

    Args:
        source: a folder, or a file of tensors (``.safetensors``, or ``.bin`` of ``torch.save``).
        destination: a folder; is made. The cores go to ``adapter_model.safetensors`` with the
            target's keys; ``to="peft"`` and ``"native"`` write all that their loaders need.
        from_, to: names of rows of ``conventions.CONVENTIONS``.
        base: the base model: a module, a state dict, or safetensors files. Needed where Sigma's
            side or the signs change, and for what describes the base weight.
        alpha: of the source; ``None``: as its ``adapter_config.json`` says.
        to_alpha: of the target; ``None``: the source's, or the rank (scale 1) where it has none.
        from_sign, to_sign: override a row's sign rule (``"v"`` for the official implementation on
            scikit-learn <= 1.4).
        route: which core to take where a layer has several (AW-LoRA-XS, Stable Audio).
        transposed: whether ``base`` stores ``[in, out]`` (GPT-2), if it is not a module.

    Raises:
        ValueError: a row cannot express the conversion, or something needed is missing; nothing is
            written.
    """
    start, target = convention(from_, "from_"), convention(to, "to")
    for row, way in ((start, "from"), (target, "to")):
        if way in row.refusal:
            raise ValueError(f"{way}: {row.library} cannot be converted {way}: {row.refusal[way]}")
    for name, sign in (("from_sign", from_sign), ("to_sign", to_sign)):
        if sign not in SIGNS:
            raise ValueError(f"{name}: got {sign!r}, expected one of {SIGNS}")
    weights = None if base is None else Base(base, transposed)
    cores = _cores.read(source, start, base=weights, alpha=alpha, sign=from_sign, route=route)
    target = dataclasses.replace(target, sign=to_sign or target.sign)
    alphas, scales, new = {}, {}, {}
    for layer, R in cores.R.items():
        alphas[layer] = to_alpha if to_alpha is not None else cores.alpha[layer]
        scales[layer] = SCALES[target.scale](alphas[layer], len(R))
        new[layer] = _converted(cores, layer, target, scales[layer], weights)
    result = Cores(target, new, scales, alphas, {}, cores.extra, cores.config)
    _written.write(Path(destination), to, result, weights)


def to_lora(
    source: str | Path,
    destination: str | Path,
    *,
    from_: str,
    base: BaseSource | None = None,
    alpha: float | None = None,
    from_sign: str | None = None,
    route: str | None = None,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter as a plain PEFT LoRA of the same rank: ``lora_A = A``, ``lora_B = s B R``.

    For whatever loads a LoRA and knows nothing of R (PEFT itself, vLLM, ...). Folded in float64,
    then cast.

    Args:
        dtype: of the written tensors.
        others: as :func:`convert`; ``base`` is needed unless the source holds A and B.

    Raises:
        ValueError: something needed is missing; nothing is written.
    """
    row = convention(from_, "from_")
    if from_sign not in SIGNS:
        raise ValueError(f"from_sign: got {from_sign!r}, expected one of {SIGNS}")
    weights = None if base is None else Base(base, transposed)
    cores = _cores.read(source, row, base=weights, alpha=alpha, sign=from_sign, route=route)
    without = [layer for layer in cores.R if layer not in cores.bases]
    if "from" in row.refusal and without:
        raise ValueError(
            f"source: {row.library} needs A and B beside every core, and {without[0]!r} has none: "
            f"{row.refusal['from']}"
        )
    factors = {}
    for layer, R in cores.R.items():
        A, B = cores.bases.get(layer) or _cores.bases(cores.row, layer, weights, len(R))
        folded = fold_to_lora(A, R, B, cores.scaling[layer])
        factors[layer] = (folded.lora_A.to(dtype), folded.lora_B.to(dtype))
    _written.write_lora(Path(destination), factors, cores, weights)


# ---------------------------------------------------------------------------------- command line


def main(argv: list[str]) -> int:
    """``python -m loraxs_kernels convert``; returns the exit status."""
    rows = "\n".join(f"  {name:13}{row.library}" for name, row in CONVENTIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m loraxs_kernels convert",
        description="Convert trained cores from one LoRA-XS implementation to another.",
        epilog=f"implementations:\n{rows}\n  {'lora':13}a plain PEFT LoRA (only --to)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", help="folder or file of the adapter")
    add("destination", help="folder to write")
    add("--from", dest="from_", required=True, choices=CONVENTIONS, metavar="NAME")
    add("--to", required=True, choices=[*CONVENTIONS, "lora"], metavar="NAME")
    add("--base", metavar="PATH", help="safetensors file, or folder of them, of the base model")
    add("--transposed", action="store_true", help="the base stores [in, out] matrices (GPT-2)")
    add("--alpha", type=float, help="of the source, if it has no adapter_config.json")
    add("--to-alpha", type=float, help="of the target (default: the source's)")
    add("--from-sign", choices=["u", "v"], help="sign rule of the source (default: its row's)")
    add("--to-sign", choices=["u", "v"], help="sign rule of the target (default: its row's)")
    add("--route", help="which core, where a layer has several")
    options = vars(parser.parse_args(argv))
    to_is_lora = options["to"] == "lora"
    if to_is_lora:
        refused = [name for name in ("to_alpha", "to_sign") if options[name] is not None]
        if refused:
            parser.error(f"--to lora takes no {', '.join(refused)}")
        options = {k: v for k, v in options.items() if k not in ("to", "to_alpha", "to_sign")}
    try:
        if to_is_lora:
            to_lora(**options)
        else:
            convert(**options)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {options['destination']}")
    return 0
