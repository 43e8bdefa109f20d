"""An evaluation is the same on any number of ranks and after any stop, and says what a slow reference says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipeline import cli, run
from pipeline.callbacks.preemption import InterruptedRunError
from pipeline.cli.settling import settle, settled
from pipeline.config import Config, compose_config
from pipeline.data.dataset import Location, open_dataset
from pipeline.data.evaluation_set import own_images
from pipeline.data.writer import write_shards
from pipeline.evaluation.predictions import Predictions, read_arrays
from pipeline.evaluation.results import Buffer
from pipeline.launch.failure import death
from pipeline.launch.plan import open_run
from pipeline.norm.apart import set_statistics
from pipeline.run.assembly import assemble
from pipeline.run.evaluating import Question, ask, evaluate
from pipeline.training.checkpoint import newest
from pipeline.world import World
from tests.conftest import noise_image
from tests.data.test_crops import reference
from tests.multiprocess.ranks import run_ranks

SIZE = 16
KINDS = [(24, 40, "JPEG", "RGB"), (40, 24, "PNG", "RGB"), (30, 30, "JPEG", "RGB"), (5, 3, "PNG", "RGB"),
         (33, 21, "JPEG", "L"), (19, 40, "PNG", "L"), (18, 18, "PNG", "RGB")]  # fmt: skip


@pytest.fixture(scope="module")
def mixed_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 validation images: portrait, landscape, square, tiny, grayscale; and 40 of training."""
    source = tmp_path_factory.mktemp("mixed")
    for split, count in (("train", 40), ("val", 21)):
        for number in range(count):
            folder = source / split / f"class{number % 6}"
            folder.mkdir(parents=True, exist_ok=True)
            width, height, kind, mode = KINDS[number % len(KINDS)]
            payload = noise_image(number * 2 + (split == "val"), width, height, kind, mode)
            (folder / f"{number:03d}.{'jpg' if kind == 'JPEG' else 'png'}").write_bytes(payload)
    root = tmp_path_factory.mktemp("packed") / "shards"
    write_shards(str(source), root, samples_per_shard=30)
    return root


def config_of(shards: Path, directory: Path, *overrides: str) -> Config:
    return compose_config(
        [
            "recipe=bn_x5", "data=folder", f"data.root={shards}", f"run.dir={directory}", f"data.image_size={SIZE}",
            "model.stem=small", "model.width=0.125", "data.global_batch_size=10", "trainer.max_steps=3",
            "trainer.max_epochs=-1", "trainer.threads=1", "tracking.mode=disabled", "norm.precise_images=30",
            "cluster.accelerator=cpu", *overrides,
        ]
    )  # fmt: skip


def train_rank(rank: int, world: int, config: Config) -> None:
    run.train(config, World.from_environment(), Console(quiet=True))


def trained(shards: Path, directory: Path, *overrides: str) -> Path:
    config = open_run(settled(config_of(shards, directory, *overrides)))
    run_ranks(1, train_rank, config)
    return config.directory


@pytest.fixture(scope="module")
def trained_run(mixed_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(mixed_shards, tmp_path_factory.mktemp("runs"), "run.id=a")


def asked(directory: Path, world: int, views: int, *overrides: str) -> Question:
    from pipeline.cli.runs import of_run

    checkpoint, _ = newest(directory / "checkpoints")
    assert checkpoint is not None
    config, dataset = settle(of_run(directory / "config.yaml", [f"cluster.devices={world}", *overrides]))
    return ask(config, own_images(dataset, config.data.num_classes), checkpoint, views)


def evaluate_rank(rank: int, world: int, directory: Path, views: int, overrides: list[str]) -> Any:
    return evaluate(asked(directory, world, views, *overrides), World.from_environment(), Console(quiet=True))


def interrupted_rank(rank: int, world: int, directory: Path, views: int, after: int) -> str:
    """A signal comes when this rank has added so many blocks."""
    add = Buffer.add

    def counted(buffer: Buffer, *arguments: Any) -> None:
        add(buffer, *arguments)
        if len(buffer.blocks) == after:
            os.kill(os.getpid(), signal.SIGTERM)

    Buffer.add = counted  # type: ignore[method-assign]
    with pytest.raises(InterruptedRunError) as caught:
        evaluate(asked(directory, world, views), World.from_environment(), Console(quiet=True))
    return str(caught.value)


def found(directory: Path, views: int, *overrides: str) -> tuple[Predictions, np.ndarray]:
    question = asked(directory, 1, views, *overrides)
    predictions = question.results().predictions
    assert predictions is not None
    return predictions, read_arrays(question.directory / "statistics.npz")["values"]


def same(left: tuple[Predictions, np.ndarray], right: tuple[Predictions, np.ndarray]) -> bool:
    (p, statistics), (q, others) = left, right
    assert p.key == q.key
    return np.array_equal(statistics, others) and all(
        np.array_equal(getattr(p, name), getattr(q, name))
        for name in ("sample_N", "label_N", "probability_NK", "loss_N")
    )


def copied(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to, ignore=shutil.ignore_patterns("evaluation*")))


@pytest.mark.parametrize("views", [1, 10, 144])
def test_three_processes_say_what_one_says_to_the_bit(trained_run, tmp_path, views):
    # More blocks than ranks; an image whose views go through the network in several passes.
    fewer = {1: ["data.micro_batch_size=7"], 10: [], 144: ["data.micro_batch_size=50"]}[views]
    answers = {}
    for world in (1, 3):
        directory = copied(trained_run, tmp_path / f"w{world}")
        scores, *others = run_ranks(world, evaluate_rank, directory, views, fewer)
        assert others == [None] * (world - 1)
        assert scores["images"] == 21
        answers[world] = found(directory, views, *fewer)
    assert same(answers[1], answers[3])


def test_a_rank_for_which_no_image_is_left_is_waited_for_by_nobody(trained_run, tmp_path):
    answers = []
    for world in (1, 4):  # 21 images in blocks of 10
        directory = copied(trained_run, tmp_path / f"w{world}")
        scores, *_ = run_ranks(world, evaluate_rank, directory, 1, [])
        assert scores["images"] == 21
        answers.append(found(directory, 1))
    assert same(*answers)


@pytest.mark.parametrize("model", [["recipe=inception", "data.image_size=32"], ["model.name=resnet18"],
                                   ["norm.precise_images=0"]])  # fmt: skip
def test_networks_with_other_norms_or_none_say_the_same_on_two_processes(mixed_shards, tmp_path, model):
    directory = trained(mixed_shards, tmp_path, "run.id=other", *model)
    other = copied(directory, tmp_path / "two")
    (scores,), (others, _) = (run_ranks(w, evaluate_rank, d, 10, []) for w, d in ((1, directory), (2, other)))
    assert (others["loss"], others["top1"]) == (scores["loss"], scores["top1"])


def test_144_views_equal_a_slow_reference(trained_run, mixed_shards, tmp_path):
    directory = copied(trained_run, tmp_path / "a")
    run_ranks(2, evaluate_rank, directory, 144, [])
    predictions, statistics = found(directory, 144)
    question = asked(directory, 1, 144)
    assembly = assemble(question.config, World())
    run.load_weights(assembly.classifier, question.checkpoint)
    network = assembly.classifier.model.eval()
    set_statistics(network, torch.from_numpy(statistics))
    images = assembly.data.train_loader.workers.items.evaluation.images
    mean, std = (np.array(getattr(question.config.data, name)) for name in ("mean", "std"))
    assert len(predictions) == 21
    for sample, probability_K in zip(predictions.sample_N, predictions.probability_NK, strict=True):
        payload = images.stream.read(int(sample))
        total = 0
        for view in reference(payload, SIZE, 144):
            normalized = torch.from_numpy(((view / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
            with torch.no_grad():
                total = total + network(normalized).main_NK.softmax(1)[0].double().numpy() / 144
        np.testing.assert_allclose(probability_K, total, rtol=0, atol=1e-5)
    kinds = {Image.open(io.BytesIO(images.stream.read(s))).mode for s in range(21)}
    assert kinds == {"RGB", "L"}


def test_an_interrupted_evaluation_goes_on_with_other_ranks_to_the_same_bits(trained_run, tmp_path):
    whole, stopped = (copied(trained_run, tmp_path / name) for name in ("whole", "stopped"))
    run_ranks(1, evaluate_rank, whole, 144, [])
    said, _ = run_ranks(2, interrupted_rank, stopped, 144, 3)
    assert said.startswith("interrupted with ")
    assert said.endswith("the same command goes on from there")
    question = asked(stopped, 1, 144)
    assert question.results().count() == 6
    assert question.scores() is None
    scores, *_ = run_ranks(3, evaluate_rank, stopped, 144, ["cluster.workers=1"])
    assert scores["images"] == 21
    assert same(found(stopped, 144), found(whole, 144))
    before = (question.directory / "predictions.npz").stat().st_mtime_ns
    assert run_ranks(1, evaluate_rank, stopped, 144, []) == [scores]  # once more: nothing is done again
    assert (question.directory / "predictions.npz").stat().st_mtime_ns == before


def test_several_runs_make_an_ensemble_whose_table_and_predictions_are_kept(
    trained_run, mixed_shards, tmp_path, capsys, monkeypatch
):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    first = copied(trained_run, tmp_path / "a")
    second = trained(mixed_shards, tmp_path, "run.id=b", "seed=1", "model.width=0.25")
    words = ["evaluate", str(first), str(second), "--views", "10", "--json"]
    assert cli.main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [member["run"] for member in facts["members"]] == [str(first), str(second)]
    (directory,) = tmp_path.glob("mean-of-2-*")
    assert Path(facts.pop("page")).is_file()
    assert json.loads((directory / "ensemble.json").read_text()) == facts
    members = [found(run, 10)[0].probability_NK for run in (first, second)]
    kept = Predictions.load(directory / "predictions.npz")
    np.testing.assert_allclose(kept.probability_NK, (members[0] + members[1]) / 2, rtol=1e-6)
    wrong = (kept.probability_NK.argmax(1) != kept.label_N).mean()
    assert facts["ensemble"]["top1_error"] == pytest.approx(wrong)
    assert cli.main(words[:-1]) == 0
    shown = capsys.readouterr().out
    assert shown.count("all 21 images were evaluated already") == 2
    assert "ensemble of 2" in shown
    assert "the best member: top-1 error" in shown


def evaluate_launched(rank: int, world: int, words: list[str]) -> tuple[int, str]:
    """A rank that another launcher than ours started: what it returns and prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main(["evaluate", *words, f"cluster.devices={world}"])
    return code, said.getvalue()


def test_ranks_of_another_launcher_evaluate_one_run_after_the_other(trained_run, mixed_shards, tmp_path):
    first = copied(trained_run, tmp_path / "a")
    second = trained(mixed_shards, tmp_path, "run.id=b", "seed=1")
    words = [str(first), str(second), "--views", "10", "--json"]
    (code, said), (other_code, other_said) = run_ranks(2, evaluate_launched, words)
    assert (code, other_code, other_said) == (0, 0, "")
    facts = json.loads(said)
    assert facts["ensemble"]["images"] == 21
    (code, said), _ = run_ranks(2, evaluate_launched, words)  # all there already
    assert (code, json.loads(said)) == (0, facts)


def test_a_signal_ends_it_with_75_and_the_same_command_goes_on(trained_run, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    directory = copied(trained_run, tmp_path / "a")
    add = Buffer.add

    def counted(buffer: Buffer, *arguments: Any) -> None:
        add(buffer, *arguments)
        if len(buffer.blocks) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Buffer, "add", counted)
        assert cli.main(["evaluate", str(directory), "--views", "144"]) == 75
    said = capsys.readouterr().err
    assert said.startswith("pipeline: interrupted with 4 of 21 images evaluated, in ")
    assert said.endswith("; the same command goes on from there\n")
    assert cli.main(["evaluate", str(directory), "--views", "144"]) == 0
    assert "going on: 4 of 21 images were evaluated already" in capsys.readouterr().out


def test_a_rank_that_is_killed_ends_it_with_75_and_the_way_on(trained_run, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    directory = copied(trained_run, tmp_path / "a")

    def launched(config: Config, words: list[str]) -> int:
        assert words[:2] == ["evaluate", str(directory)]
        raise death(1, 2, "node", -signal.SIGKILL, None, lambda *_: [])

    monkeypatch.setattr(cli.evaluate, "launch_here", launched)
    assert cli.main(["evaluate", str(directory), "cluster.devices=2"]) == 75
    said = capsys.readouterr().err
    assert "rank 1 of 2 on node was killed by signal 9 (SIGKILL)" in said
    assert f"what is evaluated is kept in {directory}/evaluation/" in said


def damaged(shards: Path, to: Path, sample: int) -> Path:
    """A copy of a data set, one validation image of which is no image any more."""
    copy = Path(shutil.copytree(shards, to))
    split = open_dataset(Location(str(copy))).split("val", 6)
    with (copy / split.entries[int(split.shard_S[sample])].shard).open("r+b") as shard:
        shard.seek(int(split.offset_S[sample]))
        shard.write(b"no image")
    return copy


def test_an_image_that_cannot_be_read_is_left_out_of_all_members_and_changes_no_other(
    trained_run, mixed_shards, tmp_path, capsys, monkeypatch
):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    whole, lacking = (copied(trained_run, tmp_path / name) for name in ("whole", "lacking"))
    bad = damaged(mixed_shards, tmp_path / "bad", 3)
    assert cli.main(["evaluate", str(whole), "--views", "10"]) == 0
    assert cli.main(["evaluate", str(lacking), "--views", "10", f"data.root={bad}"]) == 3
    assert "1 of 21 validation images cannot be used, data.bad_samples = 0.0001 allows 0" in capsys.readouterr().err
    assert cli.main(["evaluate", str(lacking), "--views", "10", f"data.root={bad}", "data.bad_samples=0.1"]) == 0
    said = capsys.readouterr().out
    assert "going on: 21 of 21 images" in said
    assert "20, 10 views of each, 1 left out" in said
    left, right = found(whole, 10)[0], found(lacking, 10)[0]
    assert right.sample_N.tolist() == [s for s in range(21) if s != 3]
    np.testing.assert_allclose(right.probability_NK, left.only(right.sample_N).probability_NK, rtol=0, atol=1e-6)
    (listed,) = lacking.glob("evaluation/*/bad-samples.jsonl")
    assert json.loads(listed.read_text())["sample"] == 3
    assert cli.main(["evaluate", str(whole), str(lacking), "--views", "10", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["left_out"], facts["ensemble"]["images"]) == (1, 20)


def test_what_makes_no_ensemble_is_refused_with_the_difference(trained_run, shards, tmp_path, capsys):
    first = copied(trained_run, tmp_path / "a")
    other = open_run(settled(config_of(shards, tmp_path, "run.id=other"))).directory
    shutil.copytree(first / "checkpoints", other / "checkpoints")
    for words, said in (
        ([str(first), str(other)], f"{first} and {other} are of different data sets"),
        ([str(first), str(first)], "a run is given twice"),
        ([str(first), str(other), "--checkpoint", "x.ckpt"], "--checkpoint x.ckpt is one file for 2 runs"),
        ([str(first), "--output", "there"], "--output there is for the table of several runs"),
        ([str(first), str(tmp_path / "none")], f"{tmp_path / 'none'} is no run"),
    ):
        assert cli.main(["evaluate", *words]) == 2
        assert said in capsys.readouterr().err
