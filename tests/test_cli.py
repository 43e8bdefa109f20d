import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli.settling import settled
from pipeline.data.shards import read_manifest
from pipeline.data.writer import write_shards
from tests.conftest import make_folders, noise_image


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, code: int, *words: str) -> str:
    """The one line that a wrong command prints, with no traceback and the right exit code."""
    try:
        status = cli.main(words)
    except SystemExit as ending:
        status = ending.code
    output = capsys.readouterr()
    assert status == code, output.err
    assert "Traceback" not in output.err
    line = output.err.strip().splitlines()[-1]
    assert output.err.count("pipeline: ") == 1
    return line


def test_ten_bad_inputs_each_give_one_clear_line_and_the_right_code(capsys, shards, folders, tmp_path):
    here = [f"data.root={shards}", "data=folder", "data.global_batch_size=24"]
    assert "did you mean trainer.max_epochs?" in refused(capsys, 2, "train", "trainer.max_epoch=3")
    assert "seed = 'many' has the wrong type; it must be a whole number" in refused(capsys, 2, "train", "seed=many")
    line = refused(capsys, 3, "train", "data=imagenet")
    assert "data.root = shards/imagenet does not exist; make it with `pipeline shards write" in line

    empty = make_folders(tmp_path / "empty", classes=2, train=2, val=1)
    (empty / "train" / "unicorns").mkdir()
    line = refused(capsys, 3, "shards", "write", str(empty), "out1")
    assert "class folder train/unicorns is empty; fill it, or remove it" in line

    text = make_folders(tmp_path / "text", classes=2, train=2, val=1)
    (text / "train" / "class1" / "readme.txt").write_text("no image")
    line = refused(capsys, 3, "shards", "write", str(text), "out2")
    assert "readme.txt is not a JPEG, PNG or WebP image; remove it from the source" in line

    line = refused(capsys, 3, "train", *here, "data.num_classes=3", "run.id=labels", "cluster.accelerator=cpu")
    assert "lies outside the 3 classes; labels run from 0 to 2: check data.num_classes" in line

    file = tmp_path / "file"
    file.write_text("x")
    assert f"data.root = {file} is a file" in refused(capsys, 3, "train", "data=folder", f"data.root={file}")
    line = refused(capsys, 2, "train", *here, "cluster.devices=4", "norm.group_size=3")
    assert "norm.group_size = 3 does not divide the world of 4 ranks; choose one of [1, 2, 4], or 0 for all" in line
    line = refused(capsys, 2, "train", *here, f"run.dir={file}/runs", "run.id=a")
    assert f"run.dir = {file}/runs: Not a directory" in line
    assert "choose a directory that can be written" in line

    from pipeline.config import compose_config
    from pipeline.launch.plan import open_run

    opened = open_run(settled(compose_config([*here, "run.id=taken"])))
    (opened.directory / "metrics.csv").touch()
    line = refused(capsys, 2, "train", *here, "run.id=taken", "optimizer.rate=0.5")
    assert "run.id = taken is another run: optimizer.rate = 0.5, the run has 0.0075; choose a new run.id" in line


def test_more_that_users_mistype(capsys, shards, tmp_path):
    here = [f"data.root={shards}", "data=folder"]
    assert "exceeds the 130 training images; lower it" in refused(capsys, 2, "train", *here)
    assert "is no run: it holds no config.yaml" in refused(capsys, 2, "evaluate", "nowhere")
    assert "does not exist" in refused(capsys, 3, "shards", "verify", "nowhere")
    assert "No such file" in refused(capsys, 2, "train", "nowhere/config.yaml")
    assert "did you mean 'resnet18'" in refused(
        capsys, 2, "train", *here, "data.global_batch_size=24", "model.name=resnet81", "cluster.accelerator=cpu"
    )
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "thesis.txt").write_text("precious")
    line = refused(capsys, 2, "train", *here, "data.global_batch_size=24", "run.id=mine")
    assert "holds no run but other files" in line


def test_going_on_with_a_run_on_changed_shards_is_refused_by_name(capsys, folders, shards):
    copy = Path(shutil.copytree(shards, "copy"))
    run = ["train", "recipe=smoke", "data=folder", f"data.root={copy}", "run.id=changed", "data.global_batch_size=24",
           "data.image_size=16", "model.stem=small", "model.width=0.125", "trainer.max_steps=2"]  # fmt: skip
    assert cli.main(run) == 0
    more = Path(shutil.copytree(folders, "more"))
    shutil.copy(more / "train/class0/000.png", more / "train/class0/999.png")
    shutil.rmtree(copy)
    write_shards(str(more), copy, samples_per_shard=30)
    line = refused(capsys, 3, "train", "runs/changed/config.yaml", "trainer.max_steps=4")
    assert "holds another data set than this run began with (train-000000.tar and 4 more changed); bring" in line


def test_a_set_without_validation_images_says_how_to_get_some(capsys, folders):
    write_shards(str(folders / "train"), Path("only-train"))
    line = refused(capsys, 3, "train", "data=folder", "data.root=only-train")
    assert "has no split 'val'; write it again from a source with val/ or with --holdout 0.1" in line


def test_a_launched_process_takes_the_frozen_config_alone(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "give RUN/config.yaml, or unset RANK" in refused(capsys, 2, "train", "recipe=bn_x5")


def test_overrides_may_stand_behind_an_option(capsys, shards):
    assert cli.main(["train", "--print-config", "recipe=bn_x30", "seed=5"]) == 0
    assert "seed: 5" in capsys.readouterr().out
    assert "is no run" in refused(capsys, 2, "evaluate", "nowhere", "--checkpoint", "best", "cluster.devices=2")
    for words in (["train", "--bogus"], ["shards", "verify", "a", "b"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_shards_verbs_write_verify_and_describe(capsys, folders, shards):
    assert cli.main(["shards", "write", str(folders), "out", "--samples-per-shard", "30", "--workers", "2"]) == 0
    assert "out: train: 130 images in 5 shards" in capsys.readouterr().out
    assert read_manifest(Path("out")).digest == read_manifest(shards).digest
    assert cli.main(["shards", "verify", "out", "--decode"]) == 0
    assert "165 images in 7 shards" in capsys.readouterr().out
    assert cli.main(["shards", "describe", "out", "--split", "val", "--sheet", "sheet.png"]) == 0
    assert "5 classes: class0, class1" in capsys.readouterr().out
    assert Path("sheet.png").stat().st_size > 1000
    shard = Path("out/train-000000.tar")
    shard.write_bytes(shard.read_bytes()[:1000] + b"!" + shard.read_bytes()[1001:])
    assert cli.main(["shards", "verify", "out"]) == 3
    assert "out/train-000000.tar" in capsys.readouterr().err


def test_print_config_shows_every_key(capsys):
    assert cli.main(["train", "recipe=bn_x30", "--print-config"]) == 0
    output = capsys.readouterr().out
    assert "rate: 0.045" in output
    assert "group_size: 0" in output


def test_help_of_every_verb_ends_in_an_example(capsys):
    for words in (["train"], ["evaluate"], ["sync"], ["shards", "write"], ["shards", "verify"], ["shards", "describe"]):
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        assert f"pipeline {' '.join(words)} " in capsys.readouterr().out.split("example:")[1]


def test_help_imports_neither_torch_nor_lightning():
    trace = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", "--help"], capture_output=True, text=True, check=True
    ).stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in trace.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "lightning", "numpy", "hydra", "wandb", "webdataset"}


def test_a_run_that_was_moved_goes_on_in_its_new_place(capsys, shards, tmp_path):
    from pipeline.config import compose_config
    from pipeline.launch.plan import open_run

    opened = open_run(settled(compose_config(["data=folder", f"data.root={shards}", "run.id=a",
                                              "data.global_batch_size=24"])))  # fmt: skip
    moved = tmp_path / "elsewhere" / "b"
    moved.parent.mkdir()
    opened.directory.rename(moved)
    assert cli.main(["train", str(moved / "config.yaml"), "--print-config"]) == 0
    output = capsys.readouterr().out
    assert f"dir: {moved.parent}" in output
    assert "id: b" in output


def test_one_process_trains_evaluates_and_journals(capsys, shards, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    words = ["data=folder", f"data.root={shards}", "data.global_batch_size=26", "data.image_size=16",
             "model.stem=small",
             "model.width=0.125", "trainer.max_epochs=1", "norm.precise_images=52", "cluster.accelerator=cpu",
             "run.id=small", "tracking.every_steps=2", "ledger=true"]  # fmt: skip
    assert cli.main(["train", *words]) == 0
    output = capsys.readouterr().out
    assert "W&B offline" in output
    assert "validation top-1" in output
    directory = Path("runs/small")
    assert {"config.yaml", "run.json", "metrics.csv", "checkpoints", "wandb", "ledger"} <= {
        path.name for path in directory.iterdir()
    }
    assert cli.main(["evaluate", str(directory), "cluster.accelerator=cpu"]) == 0
    from pipeline.callbacks.journal import read_journal

    last = [row for row in read_journal(directory / "metrics.csv") if row.split == "val"][-1]
    again = json.loads((directory / "evaluation.json").read_text())
    assert (again["top1"], again["images"]) == (last.top1, 35)
    assert again["loss"] == pytest.approx(last.loss, rel=1e-5)  # of batches that depend on no rank
    ledger = [json.loads(line) for line in (directory / "ledger" / "rank-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in ledger] == [1, 2, 3, 4, 5]
    assert len({key for line in ledger for key in line["keys"]}) == 130
    (segment,) = (directory / "wandb").glob("offline-run-*/*.wandb")
    assert segment.stat().st_size > 0


def test_images_named_badly_inside_a_zip_are_named(capsys, tmp_path):
    import zipfile

    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("train/cat/a.png", noise_image(0, 4, 4))
        archive.writestr("train/cat/b.png", "text")
    assert "a.zip:train/cat/b.png is not a JPEG" in refused(capsys, 3, "shards", "write", "a.zip", "out")


def test_who_reads_only_the_beginning_is_no_fault():
    """As `pipeline train --print-config | head -1`, of more than a pipe holds."""
    command = [sys.executable, "-c", "import sys; from pipeline import cli\n"
               "def much(options):\n    for _ in range(100_000): print('a line of what nobody reads')\n"
               "cli._parsed = lambda arguments: type('O', (), {'verb': staticmethod(much), 'goes_on': False})()\n"
               "sys.exit(cli.main([]))"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""
