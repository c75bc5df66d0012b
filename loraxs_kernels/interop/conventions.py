"""How each LoRA-XS implementation writes its trained cores down: one table.

All of them compute ``y += s * B R A x`` with ``W = U Sigma V^T``; they differ in which of A and B
has Sigma, in the scale s, in the signs of the singular vectors, and in what they store of R.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

#: How the scale follows from alpha and the rank.
SCALES = {
    "alpha/r": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),
    "1": lambda alpha, rank: 1.0,
}

#: The powers of Sigma in ``A = Sigma^a V^T`` and ``B = U Sigma^b``.
POWERS = {"A": (1.0, 0.0), "B": (0.0, 1.0), "both": (0.5, 0.5), "none": (0.0, 0.0)}

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Convention:
    """One row.

    Args:
        library: what the row is of.
        keys: templates of R's key; the first is written, all are read, in this order. ``{module}``
            is the layer's name, ``{adapter}`` any one word.
        sigma: which of A and B has the singular values (a key of :data:`POWERS`).
        scale: a key of :data:`SCALES`.
        sign: ``"u"`` or ``"v"``: each singular pair is signed so that the largest entry of its u
            (v) is positive; ``None``: as ``torch.linalg.svd`` gives it.
        stored: ``"core"`` (R), ``"core plus identity"``, ``"span"`` (R = sum_i v_i P_i) or
            ``"folded"`` (R V^T in the place of A).
        prefix: what stands before ``{module}``.
        refusal: why nothing can be converted to (``to``) or from (``from``) it.
    """

    library: str
    keys: tuple[str, ...]
    sigma: str
    scale: str
    sign: str | None
    stored: str = "core"
    prefix: str = ""
    refusal: dict[str, str] = field(default_factory=dict)

    def module_of(self, key: str) -> tuple[str, str] | None:
        """``(module, adapter)`` if ``key`` is R's, else ``None``."""
        for template in self.keys:
            pattern = re.escape(self.prefix + template).replace(re.escape("{module}"), "(.+?)")
            pattern = pattern.replace(re.escape(self.prefix), f"(?:{re.escape(self.prefix)})?", 1)
            pattern = pattern.replace(re.escape("{adapter}"), r"([^.]+?)")
            match = re.fullmatch(pattern, key)
            if match is not None:
                return match[1], match[2] if len(match.groups()) > 1 else ""
        return None

    def key_of(self, module: str, adapter: str = "default") -> str:
        """R's key for a layer."""
        return self.prefix + self.keys[0].format(module=module, adapter=adapter)


_OFFICIAL_KEYS = (
    "{module}.default_lora_latent_mapping.weight",  # PEFT >= 0.18
    "{module}_lora_latent_mapping.weight",  # PEFT <= 0.17
)
_GRADIENT = "its bases are those of a gradient estimate, which do not follow from the base weight"

CONVENTIONS: dict[str, Convention] = {
    "official": Convention(
        "MohammadrezaBanaei/LoRA-XS (scikit-learn >= 1.5; with <= 1.4 the sign rule is 'v')",
        _OFFICIAL_KEYS, "A", "alpha/r", "u", prefix=_PEFT_PREFIX,
    ),
    "lora-sb": Convention(
        "LoRA-SB, Fed-SB", _OFFICIAL_KEYS, "none", "1", None, prefix=_PEFT_PREFIX,
        refusal={"from": _GRADIENT, "to": _GRADIENT},
    ),
    "aw": Convention(
        "AW-LoRA-XS", ("{module}.cores.{adapter}.weight",), "A", "alpha/r", "u",
    ),
    "skyrl": Convention(
        "SkyRL (Megatron)", ("{module}.adapter.activation.weight",), "A", "alpha/r", None,
    ),
    "lora-lite": Convention("lora-lite", ("{module}.lora_R",), "A", "alpha/r", None),
    "tinylora": Convention(
        "PEFT TinyLoRA", ("{module}.tinylora_P", "{module}.tinylora_P.{adapter}"), "both", "1",
        None, "span", _PEFT_PREFIX,
        {"to": "its R is a sum of u fixed matrices, which cannot be any r x r matrix"},
    ),
    "psoft": Convention(
        "PEFT PSOFT (psoft_orth=False to write)", ("{module}.psoft_R.weight",), "B", "1", None,
        "core plus identity", _PEFT_PREFIX,
    ),
    "stable-audio": Convention(
        "Stable Audio 3", ("{module}.parametrizations.weight.{adapter}.M_xs",), "none", "alpha/r",
        "u",
    ),
    "eigentune": Convention("EigenTune", ("{module}.core",), "none", "1", "v"),
    "clip": Convention(
        "CLIP-LoRA_XS (its 'A' is U Sigma, its 'B' is V^T)", ("{module}.w_lora_R",), "B",
        "alpha/sqrt(r)", None,
    ),
    "rasta": Convention("RaSTA", ("{module}.R",), "both", "alpha/r", None),
    "shformer": Convention("SHFormer", ("{module}.lora_xs_core",), "both", "alpha/r", None),
    "scalingrl": Convention(
        "scalingrl (R V^T exported as lora_A)", ("{module}.lora_A.weight",), "B", "alpha/r", None,
        "folded", _PEFT_PREFIX,
    ),
    "peft": Convention(
        "loraxs_kernels.interop.peft", ("{module}.lora_R",), "A", "alpha/r", "u",
        prefix=_PEFT_PREFIX,
    ),
    "native": Convention(
        "loraxs_kernels.save_adapter", ("{module}.R",), "A", "alpha/r", "u",
    ),
}  # fmt: skip


def convention(name: str, argument: str) -> Convention:
    """The row of a name.

    Raises:
        ValueError: there is no such row; the message names ``argument``.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"{argument}: got {name!r}, expected one of {sorted(CONVENTIONS)}")
    return CONVENTIONS[name]
