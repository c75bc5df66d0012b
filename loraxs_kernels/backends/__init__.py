"""One module per backend, each with the same four functions.

``unavailable() -> str | None``     why this machine cannot run the backend at all (``None``: it
can) ``unsupported(call) -> str | None`` why it cannot run this
:class:`~loraxs_kernels.dispatch.Call` ``forward(...) -> (y, q)``          the raw forward of
``ops.py`` ``backward(...) -> (dx, dR, db)``   the raw backward of ``ops.py``
"""
