"""Networks: tables and loops over them. They take a norm factory and import no other room."""

from pipeline.models.registry import build

__all__ = ["build"]
