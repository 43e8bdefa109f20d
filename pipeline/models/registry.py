"""Models by name: our own from a dict of real imports, and every torchvision classifier."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from torch import nn

from pipeline.models.blocks import NormFactory, SampleDropout
from pipeline.models.inception import bn_inception, inception
from pipeline.models.mlp import bn_mlp, mlp

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "bn_inception": bn_inception, "inception": inception, "bn_mlp": bn_mlp, "mlp": mlp,
}  # fmt: skip
DENSE = ("bn_mlp", "mlp")  # whose weights depend on the size of an image

# Their auxiliary heads return other types from forward; without them they are classifiers like the rest.
_TORCHVISION_OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def build(name: str, *, num_classes: int, norm: NormFactory | None = None, **options: object) -> nn.Module:
    """A classifier of images (N, 3, H, W) into num_classes logits.

    name: "bn_inception", "inception", "bn_mlp", "mlp", or any torchvision classification model. norm(channels) builds
    the norms of our own; torchvision's keep torch's, to be converted by the caller. options: those of
    InceptionNetwork or DenseNetwork; torchvision models take `dropout`, and of them
    resnets `zero_gamma`. Raises ValueError naming the nearest
    model, or the options that do not exist.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, norm=norm, **options)
    check_name(name)
    # Not at the top: torchvision takes 2.7 s to import, and our own models do not need it.
    from torchvision import models as torchvision_models

    dropout, zero_gamma = options.pop("dropout", None), options.pop("zero_gamma", False)
    more: dict[str, object] = dict(_TORCHVISION_OPTIONS.get(name, {}))
    if zero_gamma:  # Goyal et al. 2017: each residual block begins as the identity
        if torchvision_models.get_model_builder(name).__module__ != torchvision_models.resnet.__name__:
            raise ValueError(f"model.zero_gamma = true: torchvision's {name} has no such option, its resnets and "
                             "resnexts have; leave it at false")  # fmt: skip
        more["zero_init_residual"] = True
    if options:
        raise ValueError(
            f"model options {sorted(options)} do not exist for torchvision's {name}; it takes dropout and zero_gamma"
        )
    model = torchvision_models.get_model(name, weights=None, num_classes=num_classes, **more)
    assert isinstance(model, nn.Module)
    return _with_sample_dropout(model, None if dropout is None else float(str(dropout)))


def check_name(name: str) -> None:
    """Raise ValueError, naming the nearest, if there is no such model."""
    if name in MODELS:
        return
    from torchvision import models as torchvision_models

    names = torchvision_models.list_models(module=torchvision_models)
    if name not in names:
        near = difflib.get_close_matches(name, [*MODELS, *names], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {list(MODELS)} or a torchvision classifier"
        raise ValueError(f"model.name = {name!r} is not a model; {hint}")


def _with_sample_dropout(model: nn.Module, p: float | None) -> nn.Module:
    """Keyed dropout and stochastic depth for torch's, whose masks would depend on ranks; p overrides dropout's rate."""
    layer = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, SampleDropout(child.p if p is None else p, layer))
            elif type(child).__name__ == "StochasticDepth":
                setattr(parent, name, SampleDropout(float(child.p), layer, whole=True))  # type: ignore[arg-type]
            else:
                continue
            layer += 1
    return model
