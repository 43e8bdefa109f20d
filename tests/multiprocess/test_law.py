"""The law of the product: a run does not depend on the number of its ranks.

Twenty steps in float64 through the product's own path (shards, order, augmentation, model, norm, DDP,
optimizer, schedule, metrics.csv), the loss of every step compared with that of other ranks and with a
loop in plain torch.
"""

from __future__ import annotations

import os
from pathlib import Path

import lightning
import pytest
import torch
from rich.console import Console
from torch import nn

from pipeline import run
from pipeline.callbacks.journal import read_journal
from pipeline.cli.settling import settled
from pipeline.config import Config, compose_config
from pipeline.launch.plan import open_run
from pipeline.norm import revert
from pipeline.run.assembly import assemble, build_trainer
from pipeline.world import World
from tests.multiprocess.ranks import run_ranks

STEPS = 20
EXACT = {"rtol": 0, "atol": 1e-9}


def law_config(shards: Path, directory: Path, *overrides: str) -> Config:
    return compose_config(
        [
            "recipe=bn_x5", "data=folder", f"data.root={shards}", f"run.dir={directory}", "data.image_size=16",
            "model.stem=small", "model.width=0.125", "data.global_batch_size=24", "optimizer.rate_batch_size=24",
            "trainer.precision=64", f"trainer.max_steps={STEPS}", "trainer.max_epochs=-1", "trainer.threads=1",
            "trainer.validate_every_epochs=1000", "trainer.checkpoint_every_steps=0", "tracking.every_steps=1",
            "tracking.mode=disabled", "norm.precise_images=60", "cluster.accelerator=cpu", *overrides,
        ]
    )  # fmt: skip


def train_rank(rank: int, world: int, config: Config) -> None:
    run.train(config, World.from_environment(), Console(quiet=True))


def losses(shards: Path, directory: Path, world: int, *overrides: str) -> torch.Tensor:
    """The loss of every step of a run on `world` ranks, as metrics.csv keeps it."""
    name = f"w{world}-{abs(hash(overrides)) % 10**8}"
    config = law_config(shards, directory, f"run.id={name}", f"cluster.devices={world}", *overrides)
    config = open_run(settled(config))
    run_ranks(world, train_rank, config)
    rows = [row for row in read_journal(config.directory / "metrics.csv") if row.split == "train"]
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    return torch.tensor([row.loss for row in rows], dtype=torch.float64)


def plain_losses(config: Config, pieces: int) -> torch.Tensor:
    """The same run as a loop in plain torch: nn.BatchNorm2d, one process, gradients added up over `pieces`."""
    config = settled(config)
    assembly = assemble(config, World())
    loader, classifier = assembly.data.train_loader, assembly.classifier.double()
    revert(classifier.model)
    assert not pieces > 1 or any(isinstance(m, nn.BatchNorm2d) for m in classifier.modules())
    groups = [
        {"params": [p for p in classifier.model.parameters() if p.dim() > 1], "weight_decay": 4e-5},
        {"params": [p for p in classifier.model.parameters() if p.dim() <= 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0075, momentum=0.9)
    recorded: list[float] = []
    while len(recorded) < STEPS:
        for batch in loader:
            optimizer.zero_grad()
            total = 0.0
            for piece in torch.arange(len(batch.label_N)).tensor_split(pieces):
                part = type(batch)(*(column[piece] for column in batch))
                loss = nn.functional.cross_entropy(classifier(part).main_NK, part.label_N, reduction="sum") / 24
                loss.backward()
                total += loss.item()
            for group in optimizer.param_groups:
                epochs = len(recorded) * 24 / 130
                group["lr"] = 0.0075 * 0.96 ** (epochs / 1.3333333)
            optimizer.step()
            recorded.append(total)
            if len(recorded) == STEPS:
                break
    return torch.tensor(recorded, dtype=torch.float64)


@pytest.fixture(scope="module")
def one_rank(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return losses(shards, tmp_path_factory.mktemp("runs"), 1)


def test_one_rank_equals_a_loop_in_plain_torch(shards, tmp_path, one_rank):
    torch.testing.assert_close(plain_losses(law_config(shards, tmp_path), pieces=1), one_rank, **EXACT)
    assert one_rank[-1] < one_rank[0]  # it learns: the comparison is not of constants


@pytest.mark.parametrize("world", [2, 3, 4])
def test_losses_do_not_depend_on_the_number_of_ranks(shards, tmp_path, one_rank, world):
    torch.testing.assert_close(losses(shards, tmp_path, world), one_rank, **EXACT)


def test_losses_do_not_depend_on_uneven_shares(shards, tmp_path):
    uneven = "data.global_batch_size=25"
    one = losses(shards, tmp_path, 1, uneven)
    for world in (3, 4):  # shares of 9, 8, 8 and of 7, 6, 6, 6
        torch.testing.assert_close(losses(shards, tmp_path, world, uneven), one, **EXACT)


@pytest.mark.parametrize("world", [2, 3])
def test_losses_do_not_depend_on_who_mixes_whose_images(shards, tmp_path, world):
    mixes = ("augment.mixup=0.4", "augment.cutmix=1", "augment.operations=2", "loss.label_smoothing=0.1",
             "data.global_batch_size=25", "model.auxiliary_head=false")  # fmt: skip
    torch.testing.assert_close(losses(shards, tmp_path, world, *mixes), losses(shards, tmp_path, 1, *mixes), **EXACT)


def test_statistics_of_so_many_images_are_of_the_same_images_on_other_ranks(shards, tmp_path):
    """12 of 24 images: of each of two ranks by itself, of four ranks by twos, of one in two micro-batches."""
    groups = "norm.group_images=12"
    two = losses(shards, tmp_path, 2, groups)
    torch.testing.assert_close(losses(shards, tmp_path, 4, groups), two, **EXACT)
    torch.testing.assert_close(losses(shards, tmp_path, 1, groups, "data.micro_batch_size=12"), two, **EXACT)


def test_local_statistics_of_ranks_are_those_of_micro_batches_of_one(shards, tmp_path):
    """What experiments/small_batch.py stands on: one process stands for ranks that normalize apart.

    Statistics of six images make about four times as much of a rounding at each step: 4e-16 becomes 2e-2 in twenty.
    """
    local = losses(shards, tmp_path, 4, "norm.group_size=1")  # 24 images = 4 ranks x 6
    one = losses(shards, tmp_path, 1, "data.micro_batch_size=6")
    torch.testing.assert_close(one[:5], local[:5], rtol=0, atol=1e-11)


def test_with_local_statistics_they_do(shards, tmp_path, one_rank):
    local = losses(shards, tmp_path, 2, "norm.group_size=1")
    assert (local - one_rank).abs().max() > 1e-3


def test_dropout_does_not_depend_on_ranks_either(shards, tmp_path):
    plain = ["recipe=inception", "model.stem=small", "schedule.warmup_epochs=0", "optimizer.rate=0.0075"]
    one = losses(shards, tmp_path, 1, *plain)
    torch.testing.assert_close(losses(shards, tmp_path, 3, *plain), one, **EXACT)
    without = losses(shards, tmp_path, 1, *plain, "model.dropout=0")
    assert (without - one).abs().max() > 1e-4  # there is dropout


def test_norms_of_single_activations_obey_the_law(shards, tmp_path, one_rank):
    single = ["model.per_activation=2", "data.global_batch_size=25"]
    one = losses(shards, tmp_path, 1, *single)
    # Statistics of 25 values make more of each rounding than those of all pixels: 1.5e-9 after 18 steps.
    torch.testing.assert_close(losses(shards, tmp_path, 3, *single), one, rtol=0, atol=1e-8)
    assert (one - one_rank).abs().max() > 1e-3  # they are not those of channels


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_networks_obey_the_law(shards, tmp_path, name):
    model = [f"model.name={name}", "model.dropout=0", "data.image_size=32", "data.global_batch_size=25"]
    one = losses(shards, tmp_path, 1, *model)
    torch.testing.assert_close(losses(shards, tmp_path, 3, *model), one, **EXACT)


def test_accumulated_losses_equal_a_reference_that_normalizes_each_micro_batch(shards, tmp_path, one_rank):
    accumulated = losses(shards, tmp_path, 2, "data.micro_batch_size=4")  # 24 images = 3 x (2 ranks x 4)
    reference = plain_losses(law_config(shards, tmp_path), pieces=3)
    # Eight images at a time: their statistics make more of each rounding, 1.3e-9 on one machine after 20 steps.
    torch.testing.assert_close(accumulated, reference, rtol=0, atol=1e-8)
    assert (accumulated - one_rank).abs().max() > 1e-4  # and it is not the whole batch's normalization


def test_in_bf16_losses_stay_within_a_band(shards, tmp_path, one_rank):
    # bf16 keeps 8 bits, other shares round other values, and training amplifies: seen 0.14 at most over 20 steps.
    half = "trainer.precision=bf16"
    one, three = losses(shards, tmp_path, 1, half), losses(shards, tmp_path, 3, half)
    assert (one - one_rank).abs()[0] > 1e-5  # it is another precision
    assert (three - one).abs()[0] < 0.02
    assert (three - one).abs().max() < 0.4
    assert (three - one).mean().abs() < 0.05


class Gradients(lightning.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.values = {name: p.grad.clone().numpy() for name, p in pl_module.named_parameters()}


def one_step(rank: int, world: int, config: Config):
    assembly = assemble(config, World.from_environment())
    gradients = Gradients()
    trainer = build_trainer(assembly, [gradients])
    trainer.fit(assembly.classifier, train_dataloaders=assembly.data.train_dataloader())
    return assembly.classifier.taken_training_scores().loss, gradients.values if rank == 0 else None


@pytest.mark.parametrize("name", ["bn_inception", "inception", "resnet18", "mobilenet_v3_small"])
def test_a_rank_without_images_changes_nothing(shards, tmp_path, name):
    results = []
    for world in (1, 3):  # two images on three ranks
        overrides = ["data.global_batch_size=2", "trainer.max_steps=1", f"cluster.devices={world}"]
        model = [f"model.name={name}", "model.response_norm=true"]
        model += ["data.image_size=64"]  # ResNet's last grid is then 2x2: two values a channel have no stable variance
        config = settled(law_config(shards, tmp_path, *overrides, *model))
        results.append(run_ranks(world, one_step, config)[0])
    (loss_one, gradients_one), (loss_three, gradients_three) = results
    assert abs(loss_one - loss_three) < 1e-9
    for parameter, gradient in gradients_one.items():
        torch.testing.assert_close(
            torch.from_numpy(gradients_three[parameter]),
            torch.from_numpy(gradient),
            rtol=1e-9,
            atol=1e-9,
            msg=parameter,
        )


class Threads(lightning.Callback):
    def on_train_batch_end(self, *_):
        self.seen = torch.get_num_threads()


def train_node(rank: int, world: int, config: Config) -> int:
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=str(rank))
    os.environ.pop("OMP_NUM_THREADS", None)
    threads = Threads()
    run.train(config, World.from_environment(), Console(quiet=True), [threads])
    return threads.seen


def test_a_rank_has_the_threads_of_its_config_and_not_its_share_of_the_cores(shards, tmp_path):
    threads = 3 if len(os.sched_getaffinity(0)) != 3 else 2
    config = law_config(shards, tmp_path, "run.id=threads", "cluster.nodes=2", "cluster.devices=1",
                        f"trainer.threads={threads}", "trainer.max_steps=2")  # fmt: skip
    assert run_ranks(2, train_node, open_run(settled(config))) == [threads] * 2
