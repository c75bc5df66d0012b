"""Device code: the functions that Triton compiles."""
