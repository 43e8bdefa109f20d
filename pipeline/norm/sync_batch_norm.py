"""Batch normalization whose statistics span a group of ranks, and the exact conversion from and to torch's layers.

Forward, over the m values of a channel in the whole group:  y = gamma (x - mu) / sqrt(s2 + eps) + beta.
Backward:  dx = gamma / sqrt(s2 + eps) (dy - mean(dy) - xhat mean(dy xhat)), both means over the group;
dgamma and dbeta stay local, since DDP averages them with all other gradients (Ioffe & Szegedy 2015).
One exchange a level of layers and direction, in float64; no value is read on the host.   Legend: N images, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.norm.collectives import GroupSize, StatisticsGroup, statistics_group
from pipeline.norm.late_gradients import LateGradients
from pipeline.norm.moments import Moments, batch_moments

Layer = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class SyncBatchNorm(nn.Module):
    """Batch normalization of (N, C, *) over all ranks of a group; state_dict keys and meaning are nn.BatchNorm2d's.

    num_features: C.  eps: added to the variance.  momentum: weight of the new batch in the running
    statistics; None: all batches weigh the same.  group_size: ranks that share statistics: 0 = all,
    1 = this one, "node", or a divisor of the world.  activation: None or "relu", applied to the output.
    A rank may hold any number of images, none included. Without a process group this is batch
    normalization of the local batch. Raises ValueError for an input without dimension C.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        group_size: GroupSize = 0,
        activation: str | None = None,
    ):
        super().__init__()
        if activation not in (None, "relu"):
            raise ValueError(f'activation = {activation!r} is not offered; choose None or "relu"')
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.group_size, self.activation = group_size, activation
        self.reverts_to: type[nn.modules.batchnorm._BatchNorm] = nn.BatchNorm2d
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features) if tracked else None)
        self.register_buffer("running_var", torch.ones(num_features) if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if tracked else None)

    def reset_running_stats(self) -> None:
        """Forget all batches seen: mean 0, variance 1."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return Level([self], [x], (), together=True).finish()[0] if self._is_on_batch else self._evaluated(x)

    def _evaluated(self, x: Tensor) -> Tensor:
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )
        return self._activated(y)

    def _activated(self, y: Tensor) -> Tensor:
        return torch.relu(y) if self.activation == "relu" else y

    @staticmethod
    def forward_level(layers: Sequence[SyncBatchNorm], xs: Sequence[Tensor]) -> list[Tensor]:
        """layers[i](xs[i]) of layers that do not depend on one another, with one exchange for all of them.

        Layers of other groups, or in another mode, than the first one are called one by one.
        """
        return SyncBatchNorm.begin_level(layers, xs).finish()

    @staticmethod
    def begin_level(
        layers: Sequence[SyncBatchNorm], xs: Sequence[Tensor], followers: Sequence[nn.Conv2d] = ()
    ) -> Level:
        """Start what forward_level does; Level.finish waits for the exchange and normalizes.

        followers: convolutions of what comes out, if nothing that normalizes lies between. Called through
        Level.convolve they leave their weights' gradients to the level, which computes them in the backward
        while its own exchange is under way.
        """
        first = layers[0]
        together = all(layer._is_on_batch and layer.group_size == first.group_size
                       and layer.training == first.training for layer in layers)  # fmt: skip
        for layer, x in zip(layers, xs, strict=True):
            layer._check(x)
        return Level(layers, xs, followers if together else (), together=together)

    @property
    def _is_on_batch(self) -> bool:
        """Whether it normalizes with the batch's statistics."""
        return self.training or self.running_mean is None

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"input of shape {tuple(x.shape)} does not fit num_features = {self.num_features}; "
                f"it must be (N, {self.num_features}, *)"
            )

    def _track(self, moments: Moments) -> None:
        """Running statistics: the variance with n - 1 over the whole group, as nn.BatchNorm2d keeps it."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        is_batch = moments.count > 0  # one without any image is none
        self.num_batches_tracked.add_(is_batch.long())
        seen = self.num_batches_tracked.clamp(min=1).double()
        weight = (1.0 / seen if self.momentum is None else self.momentum) * is_batch.double()
        for running_C, batch_C in (
            (self.running_mean, moments.mean_C),
            (self.running_var, moments.unbiased_variance_C()),
        ):
            running_C.copy_(running_C + weight * (batch_C - running_C))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, group_size={self.group_size}" + (
            f", activation={self.activation}" if self.activation else ""
        )


SyncBatchNorm2d = SyncBatchNorm


class Level:
    """Layers on their way through one exchange, and the convolutions behind them."""

    def __init__(
        self,
        layers: Sequence[SyncBatchNorm],
        xs: Sequence[Tensor],
        followers: Sequence[nn.Conv2d],
        *,
        together: bool,
    ):
        self.layers, self.xs, self.together = layers, xs, together
        if not together:
            self.late = LateGradients(())
            return
        first = layers[0]
        self.group = statistics_group(first.group_size if first.training else 1)
        hides = self.group.size > 1 and torch.is_grad_enabled()
        self.late = LateGradients(conv for conv in followers if hides and conv.bias is None)
        with torch.no_grad():
            self._merged = self.group.begin_merge([batch_moments(x) for x in xs])

    def finish(self) -> list[Tensor]:
        """What comes out of each layer."""
        if not self.together:
            return [layer(x) for layer, x in zip(self.layers, self.xs, strict=True)]
        with torch.no_grad():
            level = self._merged()
            # Gradient checkpointing runs a forward pass again inside the backward: the same batch, not another one.
            if self.layers[0].training and torch._C._current_graph_task_id() == -1:
                for layer, moments in zip(self.layers, level, strict=True):
                    layer._track(moments)
        tensors = [t for layer, x in zip(self.layers, self.xs, strict=True) for t in (x, layer.weight, layer.bias)]
        epsilons = [layer.eps for layer in self.layers]
        ys = _Normalize.apply(level, epsilons, self.group, self.late, *tensors, *self.late.weights)
        return [layer._activated(y) for layer, y in zip(self.layers, ys, strict=True)]

    def convolve(self, conv: nn.Module, x: Tensor) -> Tensor:
        """conv(x); a follower's weight gets its gradient from this level."""
        return self.late.convolve(conv, x)


class _Normalize(torch.autograd.Function):
    """Normalization of a level with given moments of the group, differentiated through those moments.

    Its tensors are x, weight and bias of each layer in turn, then the weights of late gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        level: list[Moments],
        epsilons: list[float],
        group: StatisticsGroup,
        late: LateGradients,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ys, saved = [], []
        tensors = tensors[: 3 * len(level)]
        for moments, eps, x, weight_C, bias_C in zip(
            level, epsilons, tensors[::3], tensors[1::3], tensors[2::3], strict=True
        ):
            assert x is not None
            arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
            view = [1, -1] + [1] * (x.dim() - 2)
            mean_C = moments.mean_C.to(arithmetic)
            invstd_C = (moments.variance_C() + eps).rsqrt()
            scale_C = (invstd_C if weight_C is None else invstd_C * weight_C).to(arithmetic)
            y = (x - mean_C.view(view)).mul_(scale_C.view(view))
            if bias_C is not None:
                y.add_(bias_C.view(view))
            ys.append(y.to(x.dtype))
            saved += [x, weight_C, mean_C, invstd_C, moments.count]
        ctx.save_for_backward(*saved)
        ctx.group, ctx.late = group, late
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        parts = [_Part(dy, *saved[5 * i : 5 * i + 5]) for i, dy in enumerate(dys)]
        # Every rank takes part in the exchange even if its own dx is not asked for: another rank's may be.
        arrived = ctx.group.begin_sum(torch.cat([part.sums_2C for part in parts]))
        late = ctx.late.gradients()
        totals = torch.split(arrived(), [part.sums_2C.numel() for part in parts])
        gradients: list[Tensor | None] = []
        wanted = _by_three(ctx.needs_input_grad[4 : 4 + 3 * len(parts)])
        for part, total_2C, (x, weight, bias) in zip(parts, totals, wanted, strict=True):
            sum_dy_C, sum_dy_xhat_C = part.sums_2C.chunk(2)
            dtype = part.x.dtype if part.weight_C is None else part.weight_C.dtype
            gradients += [
                part.dx(total_2C) if x else None,
                sum_dy_xhat_C.to(dtype) if weight else None,
                sum_dy_C.to(dtype) if bias else None,
            ]
        return None, None, None, None, *gradients, *late


class _Part:
    """One layer's share of a level's backward: its sums over this rank, and dx when those over the group are known."""

    def __init__(self, dy: Tensor, x: Tensor, weight_C: Tensor | None, mean_C: Tensor, invstd_C: Tensor, count: Tensor):
        self.x, self.weight_C, self.invstd_C, self.count = x, weight_C, invstd_C, count
        self.arithmetic, self.view = mean_C.dtype, [1, -1] + [1] * (x.dim() - 2)
        reduced = [d for d in range(x.dim()) if d != 1]
        self.dy = dy.to(self.arithmetic)
        self.deviation = x - mean_C.view(self.view)
        sum_dy_C = self.dy.sum(reduced).double()
        sum_dy_xhat_C = (self.dy * self.deviation).sum(reduced).double() * invstd_C
        self.sums_2C = torch.cat([sum_dy_C, sum_dy_xhat_C])

    def dx(self, total_2C: Tensor) -> Tensor:
        """Dx = scale dy - (scale mean(dy xhat) invstd) deviation - scale mean(dy); to be asked for once."""
        mean_dy_C, mean_dy_xhat_C = (total_2C / self.count.clamp(min=1)).chunk(2)
        scale_C = self.invstd_C if self.weight_C is None else self.invstd_C * self.weight_C
        dx = self.deviation.mul_((-scale_C * mean_dy_xhat_C * self.invstd_C).to(self.arithmetic).view(self.view))
        dx.add_((-scale_C * mean_dy_C).to(self.arithmetic).view(self.view))
        dx.addcmul_(self.dy, scale_C.to(self.arithmetic).view(self.view))
        return dx.to(self.x.dtype)


def _by_three(flags: Sequence[bool]) -> Iterator[tuple[bool, bool, bool]]:
    return zip(flags[::3], flags[1::3], flags[2::3], strict=True)


def convert(module: nn.Module, *, group_size: GroupSize = 0) -> nn.Module:
    """Replace every nn.BatchNorm1d/2d/3d in module by SyncBatchNorm with the same tensors; returns the module.

    A layer used at several places stays one layer. `revert` is the exact inverse.
    """

    def synchronized(layer: nn.Module) -> nn.Module | None:
        if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            return None
        assert isinstance(layer, Layer)
        new = SyncBatchNorm(
            layer.num_features,
            eps=layer.eps,
            momentum=layer.momentum,
            affine=layer.affine,
            track_running_stats=layer.track_running_stats,
            group_size=group_size,
        )
        new.reverts_to = type(layer)
        return _with_tensors_of(layer, new)

    return _replaced(module, synchronized)


def revert(module: nn.Module) -> nn.Module:
    """Replace every SyncBatchNorm by the nn.BatchNorm1d/2d/3d it came from (2d if from none), same tensors.

    Raises ValueError for a layer with a fused activation: torch's layers have none.
    """

    def plain(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, SyncBatchNorm):
            return None
        if layer.activation:
            raise ValueError(
                f"SyncBatchNorm({layer.num_features}) has activation = {layer.activation!r}, which nn.BatchNorm2d "
                "lacks; build the model with activation=None and a separate nonlinearity"
            )
        new = layer.reverts_to(
            layer.num_features,
            eps=layer.eps,
            momentum=layer.momentum,
            affine=layer.affine,
            track_running_stats=layer.track_running_stats,
        )
        return _with_tensors_of(layer, new)

    return _replaced(module, plain)


def _with_tensors_of(old: nn.Module, new: nn.Module) -> nn.Module:
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    return new.train(old.training)


def _replaced(module: nn.Module, replacement: Any) -> nn.Module:
    """Module with every submodule that has a replacement exchanged, shared ones once."""
    done: dict[nn.Module, nn.Module] = {}

    def visit(current: nn.Module) -> nn.Module:
        if current not in done:
            done[current] = current
            new = replacement(current)
            if new is not None:
                done[current] = new
            for name, child in current._modules.items():
                if child is not None:
                    current._modules[name] = visit(child)
        return done[current]

    return visit(module)
