"""LoRA-XS as a method of PEFT, and PEFT's own LoRA-XS kin on this package's kernels.

Importing this module registers the method, as PEFT type ``LORAXS``::

    import peft
    from loraxs_kernels.interop.peft import LoRAXSConfig

    model = peft.get_peft_model(model, LoRAXSConfig(r=16, lora_alpha=16, target_modules=["query"]))

What PEFT offers for LoRA works on it: ``transformers.Trainer``, ``save_pretrained`` and
``from_pretrained``, several adapters, ``set_adapter``, ``disable_adapter``, batches that mix
adapters (``adapter_names``), merging.

A saved adapter is R and a description of what it belongs to (rank, scaling, conventions, the hash
of the base weight, a fingerprint of the bases); A and B follow from the base weight. PEFT without
this module does not know the type ``LORAXS`` and refuses to load it: it is never taken for a LoRA.

:func:`accelerate` gives the same kernels to the layers of PEFT's TinyLoRA and PSOFT.
"""

from __future__ import annotations

from loraxs_kernels.interop import _peft_version

# Before what follows meets a PEFT that lacks something.
_peft_version.check()

from loraxs_kernels.interop._peft_layer import LoRAXSLayer  # noqa: E402
from loraxs_kernels.interop._peft_method import NAME, LoRAXSConfig, LoRAXSModel  # noqa: E402
from loraxs_kernels.interop._peft_variants import accelerate  # noqa: E402

__all__ = ["NAME", "LoRAXSConfig", "LoRAXSLayer", "LoRAXSModel", "accelerate"]
