"""Batch normalization whose statistics span a group of ranks, and the exact conversion from and to torch's layers.

Forward, over the m values of a channel in the whole group:  y = gamma (x - mu) / sqrt(s2 + eps) + beta.
Backward:  dx = gamma / sqrt(s2 + eps) (dy - mean(dy) - xhat mean(dy xhat)), both means over the group;
dgamma and dbeta stay local, since DDP averages them with all other gradients (Ioffe & Szegedy 2015).
One exchange a level of layers and direction, in float64; no value is read on the host.
Legend: N images, C channels, R ranks, P numbers of a packet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.norm import fused, normalization
from pipeline.norm.collectives import GroupSize, StatisticsGroup, statistics_group
from pipeline.norm.late_gradients import LateGradients
from pipeline.norm.normalization import Running, Statistics

Observer = Callable[[Tensor], None]
Looker = Callable[[Tensor, Statistics], None]
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
        self.frozen = False  # set by freezing.freeze: the running statistics serve in training, too
        self.reverts_to: Callable[..., nn.modules.batchnorm._BatchNorm] = nn.BatchNorm2d
        self._observers: list[Observer] = []
        self._lookers: list[Looker] = []
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features) if tracked else None)
        self.register_buffer("running_var", torch.ones(num_features) if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if tracked else None)

    def train(self, mode: bool = True) -> SyncBatchNorm:
        """As nn.Module's; one that is frozen stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def reset_running_stats(self) -> None:
        """Forget all batches seen: mean 0, variance 1."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return Level([self], [x], (), None, together=True).finish()[0] if self._is_on_batch else self._evaluated(x)

    def _evaluated(self, x: Tensor) -> Tensor:
        y = nn.functional.batch_norm(
            self.flat(x), self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )
        return self.back(torch.relu(y) if self.activation == "relu" else y)

    def flat(self, x: Tensor) -> Tensor:
        """What is normalized, with the features along dimension 1."""
        return x

    def back(self, y: Tensor) -> Tensor:
        """The output, of what `flat` gave and was normalized."""
        return y

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Call observer(rows_RP) with each training batch's packets of the ranks (moments.py); returns what ends that.

        In a large group there is one row, of the union. Nothing is computed or exchanged for it.
        """
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    def look(self, looker: Looker) -> Callable[[], None]:
        """Call looker(x, statistics) with each training batch of this rank, before it is normalized with those.

        It may not change them. Returns what ends that.
        """
        self._lookers.append(looker)
        return lambda: self._lookers.remove(looker)

    @staticmethod
    def forward_level(layers: Sequence[SyncBatchNorm], xs: Sequence[Tensor]) -> list[Tensor]:
        """layers[i](xs[i]) of layers that do not depend on one another, with one exchange for all of them.

        Layers of other groups, or in another mode, than the first one are called one by one.
        """
        return SyncBatchNorm.begin_level(layers, xs).finish()

    @staticmethod
    def begin_level(
        layers: Sequence[SyncBatchNorm],
        xs: Sequence[Tensor],
        followers: Sequence[nn.Conv2d] = (),
        activation: str | None = None,
    ) -> Level:
        """Start what forward_level does; Level.finish waits for the exchange and normalizes.

        followers: convolutions of what comes out, if nothing that normalizes lies between. Called through
        Level.convolve they leave their weights' gradients to the level, which computes them in the backward
        while its own exchange is under way.
        activation: None or "relu", applied to what comes out of every layer, whether it has one of its own or not.
        """
        first = layers[0]
        together = all(layer._is_on_batch and layer.group_size == first.group_size
                       and layer.training == first.training for layer in layers)  # fmt: skip
        for layer, x in zip(layers, xs, strict=True):
            layer._check(x)
        return Level(layers, xs, followers if together else (), activation, together=together)

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

    @property
    def _running(self) -> Running | None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return None
        return Running(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)

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
        activation: str | None,
        *,
        together: bool,
    ):
        self.layers, self.xs, self.together, self.activation = layers, xs, together, activation
        self._flat = [layer.flat(x) for layer, x in zip(layers, xs, strict=True)] if together else []
        if not together:
            self.late = LateGradients(())
            return
        first = layers[0]
        self.group = statistics_group(first.group_size if first.training else 1)
        # A compiler orders a traced graph itself, and cannot follow what is put off from one node to another.
        hides = self.group.size > 1 and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.late = LateGradients(conv for conv in followers if hides and conv.bias is None)
        with torch.no_grad():
            self._rows = self.group.begin_merge([_arithmetic(x).packet(x) for x in self._flat])

    def room(self, channels: int) -> Tensor | None:
        """A tensor of so many channels, slices of which `finish` of this level or a next one writes; None if it cannot.

        For outputs that go side by side into one tensor anyway: what is written there need not be copied there.
        """
        if not self.together or not all(_arithmetic(x) is fused for x in self._flat):
            return None
        if any(flat is not x for flat, x in zip(self._flat, self.xs, strict=True)):
            return None  # what comes out of a norm of single activations is shaped once more
        return fused.room(self.xs[0], channels)

    def finish(self, places: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """What comes out of each layer; at its place, if it has one in a `room`."""
        if not self.together:
            ys = [layer(x) for layer, x in zip(self.layers, self.xs, strict=True)]
            return [torch.relu(y) for y in ys] if self.activation == "relu" else ys
        with torch.no_grad():
            # Gradient checkpointing runs a forward pass again inside the backward: the same batch, not another one.
            tracks = self.layers[0].training and not _is_in_backward()
            tensors: list[Tensor | None] = []
            for layer, x, rows_RP in zip(self.layers, self._flat, self._rows(), strict=True):
                kind = torch.float64 if x.dtype == torch.float64 else torch.float32
                running = layer._running if tracks else None
                for observer in layer._observers if tracks else ():
                    observer(rows_RP)
                known = _arithmetic(x).statistics(rows_RP, layer.weight, layer.eps, kind, running)
                for looker in layer._lookers if tracks else ():
                    looker(x, Statistics(*known))
                tensors += [x, layer.weight, layer.bias, *known]
        activations = [layer.activation or self.activation for layer in self.layers]
        weights = self.late.weights
        late = self.late if weights else None
        ys = _Normalize.apply(activations, self.group, late, list(places), *tensors, *weights)
        return [layer.back(y) for layer, y in zip(self.layers, ys, strict=True)]

    def convolve(self, conv: nn.Module, x: Tensor) -> Tensor:
        """conv(x); a follower's weight gets its gradient from this level."""
        return self.late.convolve(conv, x)


def _is_in_backward() -> bool:
    """A trace has no forward pass that runs again: its compiler repeats operations, not this code."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _arithmetic(x: Tensor) -> Any:
    """The kernels where they serve; plain operations elsewhere, and in a trace, whose compiler fuses them itself."""
    return fused if not torch.compiler.is_compiling() and fused.serves(x) else normalization


_OF_A_LAYER = 3 + len(Statistics._fields)  # x, weight and bias, and what it normalizes with


class _Normalize(torch.autograd.Function):
    """Normalization of a level with given statistics of the group, differentiated through those statistics.

    Its tensors are those of each layer in turn, then the weights of late gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activations: list[str | None],
        group: StatisticsGroup,
        late: LateGradients | None,
        places: list[Tensor | None],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        ys: list[Tensor] = []
        saved: list[Tensor | None] = []
        ctx.fused = []
        for i, activation in enumerate(activations):
            x, weight_C, bias_C, *known = tensors[_OF_A_LAYER * i : _OF_A_LAYER * (i + 1)]
            arithmetic = _arithmetic(x)
            place = {"out": places[i]} if places and arithmetic is fused else {}
            y = arithmetic.normalized(x, Statistics(*known), bias_C, activation, **place)
            # The kernels compute the mask of a ReLU again; plain operations read it off y, which the next layer keeps.
            saved += [x, weight_C, bias_C, *known, y if activation and arithmetic is normalization else None]
            # Kept, since x may come back otherwise: hooks of saved tensors move them, and forget how they lay.
            ctx.fused.append(arithmetic is fused)
            ys.append(y)
        ctx.save_for_backward(*saved)
        ctx.activations, ctx.group, ctx.late = activations, group, late
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        layers = _in_turn(ctx.saved_tensors, _OF_A_LAYER + 1)
        shares = [_backward(*each) for each in zip(dys, layers, ctx.activations, ctx.fused, strict=True)]
        # Every rank takes part in the exchange even if its own dx is not asked for: another rank's may be.
        arrived = ctx.group.begin_sum(torch.cat([share.sums_2C for share in shares]))
        late = ctx.late.gradients() if ctx.late else ()
        totals = torch.split(arrived(), [share.sums_2C.numel() for share in shares], dim=1)
        gradients: list[Tensor | None] = []
        wanted = _in_turn(ctx.needs_input_grad[4 : 4 + _OF_A_LAYER * len(shares)], _OF_A_LAYER)
        for share, totals_RP, layer, wants in zip(shares, totals, layers, wanted, strict=True):
            sum_dy_C, sum_dy_xhat_C = share.sums_2C.chunk(2)
            dtype = share.x.dtype if layer[1] is None else layer[1].dtype
            gradients += [
                share.dx(totals_RP) if wants[0] else None,
                sum_dy_xhat_C.to(dtype) if wants[1] else None,
                sum_dy_C.to(dtype) if wants[2] else None,
                *(None for _ in Statistics._fields),
            ]
        return None, None, None, None, *gradients, *late


def _backward(dy: Tensor, layer: Sequence[Tensor], activation: str | None, is_fused: bool) -> Any:
    """A layer's share of the backward, of what was saved of it."""
    x, weight_C, bias_C, *known, y = layer
    if is_fused:
        return fused.Backward(dy, x, Statistics(*known), bias_C, activation)
    return normalization.Backward(dy, x, y, Statistics(*known), weight_C)


def _in_turn(flat: Sequence[Any], each: int) -> list[Sequence[Any]]:
    return [flat[i : i + each] for i in range(0, len(flat), each)]


def convert(module: nn.Module, *, group_size: GroupSize = 0) -> nn.Module:
    """Replace every nn.BatchNorm1d/2d/3d in module by SyncBatchNorm with the same tensors; returns the module.

    A layer used at several places stays one layer. `revert` is the exact inverse.
    """

    def synchronized(layer: nn.Module) -> nn.Module | None:
        # A plain norm of single activations (per_activation.py) knows what it is in ours.
        ours: Any = getattr(layer, "converts_to", None)
        if ours is None and type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            return None
        assert isinstance(layer, Layer)
        new: SyncBatchNorm = (ours or partial(SyncBatchNorm, layer.num_features))(
            eps=layer.eps,
            momentum=layer.momentum,
            affine=layer.affine,
            track_running_stats=layer.track_running_stats,
            group_size=group_size,
        )
        if ours is None:
            new.reverts_to = type(layer)
        return _with_tensors_of(layer, new)

    return _replaced(module, synchronized)


def revert(module: nn.Module) -> nn.Module:
    """Replace every SyncBatchNorm by the nn.BatchNorm1d/2d/3d it came from (2d if from none), same tensors.

    A PerActivationNorm becomes a PlainPerActivationNorm, a BatchNorm1d of flattened activations, and `convert` undoes
    that, too. Raises ValueError for a layer with a fused activation: torch's layers have none.
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
