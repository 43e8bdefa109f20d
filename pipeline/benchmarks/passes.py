"""How often a layer reads and writes its activation, counted operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Passes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operands and results of a given size; views and empty tensors move nothing."""

    def __init__(self, size: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.reads, self.writes = size, 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and "empty" not in str(func):
            # What an operation overwrites without reading it (copy_, zero_, fill_) is its first operand.
            overwritten = str(func).split(".")[1] in ("copy_", "zero_", "fill_")
            self.reads += sum(self._is_whole(value) for value in args[1 if overwritten else 0 :])
            results = result if isinstance(result, tuple | list) else (result,)
            self.writes += sum(self._is_whole(value) for value in results)
        return result

    def _is_whole(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.numel() == self.size


def passes(layer: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """Reads and writes of tensors of the size of x, in a forward and a backward whose gradient is given."""
    x = x.detach().requires_grad_()
    dy = torch.ones_like(x)
    with _Passes(x.numel()) as count:
        layer(x).backward(dy)  # type: ignore[no-untyped-call]
    return count.reads, count.writes
