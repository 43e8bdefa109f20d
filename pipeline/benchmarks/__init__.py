"""Ours beside the peers: one file = one table of benchmarks.md."""
