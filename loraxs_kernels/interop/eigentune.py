"""A backend for EigenTune's registry: its LoRA-XS layers (``method="spectral_core"``) on ours.

EigenTune computes the base layer itself and asks its backend for the update,
``y = base + (x Vh^T) w^T U^T``, which is :func:`loraxs_kernels.lora_xs_update` with ``A = Vh``,
``R = w`` and ``B = U``. Its layers choose a backend by name, but its configuration only lets the
names of its own pass; :func:`accelerate` gives ours to the layers of a model that is made already.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from loraxs_kernels import ops

NAME = "loraxs"

#: EigenTune versions whose registry this was tested with.
TESTED = ("0.2.0",)


class Backend:
    """Implements ``eigentune.kernels.dispatch.Backend`` for ``kind="core"``."""

    name = NAME

    def available(self) -> bool:
        """Whether any of this package's kernels run here."""
        return True

    def supports(self, x: Tensor, rank: int, kind: str) -> bool:
        """Whether ``forward`` can run on ``x [N, in]``."""
        return kind == "core" and 1 <= rank <= 512 and x.is_floating_point() and x.dim() == 2

    def supports_bwd(self, q: Tensor, rank: int, kind: str) -> bool:
        """Whether ``backward`` can run with the saved ``q [N, r]``."""
        return self.supports(q, rank, kind)

    def forward(
        self, x: Tensor, Vh: Tensor, U: Tensor, w: Tensor, kind: str, base_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(base_out + (x Vh^T) w^T U^T  [N, out], x Vh^T [N, r])``."""
        self._check(kind)
        return ops.forward(
            x, None, base_out, Vh, w, U, None, None, None, None, None, 1.0, 0.0,
            ops.PREPACK_AUTO, "",
        )  # fmt: skip

    def backward(
        self, g: Tensor, Q: Tensor, Vh: Tensor, U: Tensor, w: Tensor, kind: str, need_x: bool
    ) -> tuple[Tensor | None, Tensor]:
        """``((g U w) Vh [N, in] or None, (g U)^T Q [r, r])``."""
        self._check(kind)
        dx, dw, _ = ops.backward(
            g, Q, None, Vh, w, U, None, None, None, None, 1.0, 0.0, need_x, True, False,
            ops.PREPACK_AUTO, "",
        )  # fmt: skip
        return (dx if need_x else None), dw

    @staticmethod
    def _check(kind: str) -> None:
        if kind != "core":
            raise ValueError(f"kind: got {kind!r}, expected 'core' (a matrix between the bases)")


def register() -> Any:
    """Add the backend to EigenTune's registry, under the name ``"loraxs"``.

    Returns:
        the backend; layers use it after :func:`accelerate`.

    Raises:
        ImportError: EigenTune is not installed, or has no registry of backends.
    """
    try:
        from eigentune.kernels import register_backend
    except ImportError as error:
        raise ImportError(
            f"eigentune: no registry of backends found ({error}); expected one of the versions "
            f"{', '.join(TESTED)}: pip install eigentune"
        ) from error
    backend = Backend()
    register_backend(backend)
    return backend


def accelerate(model: nn.Module) -> nn.Module:
    """Register the backend and let every LoRA-XS layer of an EigenTune model use it, in place.

    What is saved with the model names EigenTune's own backend as before: adapters load anywhere.

    Args:
        model: a model after ``get_eigentune_model``, or a single ``EigenTuneLinear``.

    Returns:
        ``model`` itself.

    Raises:
        ImportError: as :func:`register`.
        TypeError: ``model`` is not a module.
        ValueError: it has no EigenTune layer with a core between its bases.
    """
    register()
    from eigentune import EigenTuneLinear

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    layers = [m for m in model.modules() if isinstance(m, EigenTuneLinear) and m.kind == "core"]
    if not layers:
        raise ValueError("model: has no EigenTune layer with a core (method='spectral_core')")
    for layer in layers:
        # A copy, past the check of names: the model's own configuration stays as it was.
        layer.cfg = copy.copy(layer.cfg)
        object.__setattr__(layer.cfg, "backend", NAME)
    return model
