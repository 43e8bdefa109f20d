"""Inference-time batch norm folded into the layer before it.

W' = a W, b' = beta + a (b - mean), with a = gamma / sqrt(var + eps).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.norm.sync_batch_norm import SyncBatchNorm

Foldable = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class _LeafNorms(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SyncBatchNorm) or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def fold(module: nn.Module) -> nn.Module:
    """A copy of module in evaluation mode whose norms are folded into the convolution or linear layer before them.

    A norm whose input is not such a layer's only use (a pre-activation norm, say) stays as it is.
    The arithmetic is float64, rounded once. Raises fx.proxy.TraceError for a forward pass that
    depends on values.
    """
    folded = copy.deepcopy(module).eval()
    modules = dict(folded.named_modules())
    graph = _LeafNorms().trace(folded)
    uses: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            uses[node.target] = uses.get(node.target, 0) + 1
    for node in graph.nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, SyncBatchNorm | _BatchNorm) or norm.running_mean is None:
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1 or uses[before.target] > 1 or uses[node.target] > 1:
            continue
        layer = modules[before.target]
        if isinstance(layer, Foldable):
            _fold_pair(layer, norm)
            _replace(folded, node.target, nn.ReLU() if getattr(norm, "activation", None) else nn.Identity())
    return folded


def _fold_pair(layer: Foldable, norm: Any) -> None:
    factor_C = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor_C = factor_C * norm.weight.double()
    shift_C: Tensor = -norm.running_mean.double()
    if layer.bias is not None:
        shift_C = shift_C + layer.bias.double()
    bias_C = factor_C * shift_C
    if norm.bias is not None:
        bias_C = bias_C + norm.bias.double()
    weight = layer.weight
    weight.copy_(weight.double() * factor_C.view([-1] + [1] * (weight.dim() - 1)))
    layer.bias = nn.Parameter(bias_C.to(weight.dtype))


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._modules[leaf] = new
