"""Distributed training in which an interrupted run is the same run and synchronized statistics cost almost nothing."""

__version__ = "0.1.0"
