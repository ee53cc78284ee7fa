"""Benchmarks: comparisons within one run, because ratios hold where absolute times do not."""
