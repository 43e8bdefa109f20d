import io

import pytest
import torch

from pipeline import models
from pipeline.norm import SyncBatchNorm
from pipeline.training.optimizer import OPTIMIZERS, Descent, build_optimizer


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build("bn_inception", num_classes=3, norm=SyncBatchNorm, stem="small", width=0.125)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_spares_biases_gamma_and_beta(name):
    model = network()
    optimizer = build_optimizer(model, Descent(name, weight_decay=4e-5))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (4e-5, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    assert all("norm" in names[id(p)] or names[id(p)] == "classifier.bias" for p in spared["params"])
    assert len(decayed["params"]) == 69 + 1
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert [len(g["params"]) for g in build_optimizer(model, Descent(weight_decay=1)).param_groups] == [1]


def stepped(descent: Descent, rate: float, gradients: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.nn.Linear:
    """A layer of weights 2 and biases 1 after a step with each pair of gradients."""
    layer = torch.nn.Linear(3, 2).double()
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(1.0)
    optimizer = build_optimizer(layer, descent)
    for group in optimizer.param_groups:
        group["lr"] = rate  # as the schedule sets it, over the 1 that it was built with
    for of_weight, of_bias in gradients:
        layer.weight.grad, layer.bias.grad = of_weight.clone(), of_bias.clone()
        optimizer.step()
        assert torch.equal(layer.weight.grad, of_weight)  # a view of DDP's bucket stays as it is
    return layer


GRADIENT = (torch.arange(6.0).view(2, 3).double() / 7 + 0.1, torch.tensor([0.5, -0.25], dtype=torch.float64))


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_lars_is_its_papers_update_for_weights_and_plain_momentum_for_vectors(decay):
    layer = stepped(Descent("lars", 0.9, decay, trust_coefficient=0.02), 0.3, [GRADIENT, GRADIENT])
    weight, bias = torch.full((2, 3), 2.0).double(), torch.ones(2).double()
    momentum_w, momentum_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for _ in range(2):
        ratio = 0.02 * weight.norm() / (GRADIENT[0].norm() + decay * weight.norm() + 1e-8)
        momentum_w = 0.9 * momentum_w + ratio * (GRADIENT[0] + decay * weight)
        momentum_b = 0.9 * momentum_b + GRADIENT[1]
        weight, bias = weight - 0.3 * momentum_w, bias - 0.3 * momentum_b
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-12, atol=0)


def test_clipped_lars_never_takes_a_longer_step_than_sgd():
    """The ratio is measured against the rate of the step, whatever the optimizer was built with."""
    big, small = 1e9, 0.02
    plain = stepped(Descent("sgd", 0.0), 0.3, [GRADIENT])
    clipped = stepped(Descent("lars", 0.0, trust_coefficient=big, trust_clip=True), 0.3, [GRADIENT])
    torch.testing.assert_close(clipped.weight, plain.weight)
    lower = stepped(Descent("lars", 0.0, trust_coefficient=small, trust_clip=True), 0.3, [GRADIENT])
    moved = (lower.weight - 2.0).norm()
    torch.testing.assert_close(moved.item(), small * 2 * 6**0.5, rtol=1e-6, atol=0)


def test_lamb_is_its_papers_update_for_weights_and_adams_for_vectors():
    decay, rate, eps = 0.05, 0.3, 1e-6
    layer = stepped(Descent("lamb", 0.9, decay, second_momentum=0.99), rate, [GRADIENT])
    scale = max(float(torch.cat([g.flatten() for g in GRADIENT]).norm()), 1.0)
    expected = []
    for value, gradient in zip((torch.full((2, 3), 2.0).double(), torch.ones(2).double()), GRADIENT, strict=True):
        g = gradient / scale
        update = g / (g.abs() + eps)  # after a step the corrected moments are the gradient and its square
        if value.dim() > 1:
            update = update + decay * value
            update = update * value.norm() / update.norm()
        expected.append(value - rate * update)
    torch.testing.assert_close(layer.weight.detach(), expected[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(layer.bias.detach(), expected[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("descent", [Descent("sgd", nesterov=True), Descent("lars", weight_decay=1e-4, nesterov=True),
                                     Descent("lars", trust_clip=True), Descent("lamb", weight_decay=0.01)],
                         ids=lambda d: f"{d.name}{d.trust_clip or ''}")  # fmt: skip
def test_an_optimizer_goes_on_from_its_state_with_the_same_bits(descent):
    def trained(optimizer: torch.optim.Optimizer, model: torch.nn.Module, steps: range) -> None:
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=draw)
            optimizer.step()

    whole, broken = network(), network()
    trained(build_optimizer(whole, descent), whole, range(5))
    first = build_optimizer(broken, descent)
    trained(first, broken, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = build_optimizer(broken, descent)
    second.load_state_dict(torch.load(file, weights_only=True))
    trained(second, broken, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))
