"""Programs that use the package; each runs as ``python -m examples.NAME``."""
