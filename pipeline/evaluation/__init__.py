"""Exact evaluation: sums that merge, each image counted once."""
