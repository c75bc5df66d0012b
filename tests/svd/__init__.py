"""Tests of randomized_svd."""
