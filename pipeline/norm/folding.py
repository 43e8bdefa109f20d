"""Inference-time batch norm folded into the layer before it.

W' = a W, b' = beta + a (b - mean), with a = gamma / sqrt(var + eps). A norm of single activations has an a for each
place, which no convolution has: it becomes y = a x + (beta - a mean).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.norm.per_activation import PerActivationNorm, PlainPerActivationNorm
from pipeline.norm.sync_batch_norm import SyncBatchNorm

Foldable = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class _LeafNorms(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SyncBatchNorm | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


class Elementwise(nn.Module):
    """y = scale x + shift of single activations, and a ReLU if there was one. Input (N, C, H, W)."""

    def __init__(self, scale_CHW: Tensor, shift_CHW: Tensor, *, relu: bool):
        super().__init__()
        self.relu = relu
        self.weight, self.bias = nn.Parameter(scale_CHW.contiguous()), nn.Parameter(shift_CHW.contiguous())

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = x_NCHW * self.weight + self.bias
        return torch.relu(y_NCHW) if self.relu else y_NCHW


@torch.no_grad()
def fold(module: nn.Module) -> nn.Module:
    """A copy of module in evaluation mode whose norms are folded into the convolution or linear layer before them.

    A norm whose input is not such a layer's only use (a pre-activation norm, say) stays as it is. One of single
    activations becomes an Elementwise wherever it stands.
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
        if isinstance(norm, PerActivationNorm | PlainPerActivationNorm):
            _replace(folded, node.target, _elementwise(norm))
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1 or uses[before.target] > 1 or uses[node.target] > 1:
            continue
        layer = modules[before.target]
        if isinstance(layer, Foldable):
            _fold_pair(layer, norm)
            _replace(folded, node.target, nn.ReLU() if getattr(norm, "activation", None) else nn.Identity())
    return folded


def _factor(norm: Any) -> Tensor:
    """The a of the formulas above: gamma / sqrt(var + eps), in float64."""
    factor_C: Tensor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor_C if norm.weight is None else factor_C * norm.weight.double()


def _elementwise(norm: PerActivationNorm | PlainPerActivationNorm) -> Elementwise:
    assert norm.running_mean is not None
    scale_F = _factor(norm)
    shift_F = -scale_F * norm.running_mean.double()
    if norm.bias is not None:
        shift_F = shift_F + norm.bias.double()
    scale_CHW, shift_CHW = (norm.places.by_place(each.to(norm.running_mean.dtype)) for each in (scale_F, shift_F))
    return Elementwise(scale_CHW, shift_CHW, relu=getattr(norm, "activation", None) == "relu")


def _fold_pair(layer: Foldable, norm: Any) -> None:
    factor_C = _factor(norm)
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
