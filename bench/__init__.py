"""Benchmarks: this package beside the bare layer and its peers, in one process, interleaved."""
