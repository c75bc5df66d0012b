"""Fast, trustworthy LoRA-XS layers: ``y = W x + b + s * B (R (A x))`` with only R trained."""

from loraxs_kernels._version import __version__
from loraxs_kernels.adapters import AdapterBatch
from loraxs_kernels.backends.packing import invalidate_packed
from loraxs_kernels.backends.triton.autotune import autotune
from loraxs_kernels.checkpoint import load_adapter, save_adapter
from loraxs_kernels.factors import LoRAFactors, LoRAXSFactors, lora_xs_factors
from loraxs_kernels.functional import lora_xs_linear, lora_xs_update
from loraxs_kernels.injection import LoRAXSConfig, eject_lora_xs, inject_lora_xs
from loraxs_kernels.nn import LoRAXSLinear, use_adapters
from loraxs_kernels.svd import SVDResult, randomized_svd

__all__ = [
    "AdapterBatch",
    "LoRAFactors",
    "LoRAXSConfig",
    "LoRAXSFactors",
    "LoRAXSLinear",
    "SVDResult",
    "__version__",
    "autotune",
    "eject_lora_xs",
    "inject_lora_xs",
    "invalidate_packed",
    "load_adapter",
    "lora_xs_factors",
    "lora_xs_linear",
    "lora_xs_update",
    "randomized_svd",
    "save_adapter",
    "use_adapters",
]
