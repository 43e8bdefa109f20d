"""model.init: what a run may begin from, what of it is new, and what is refused."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from pipeline import cli
from pipeline.cli.settling import settled
from pipeline.config import Config, ConfigError, completed, compose_config, differences, identity
from pipeline.models.layouts import mean_of
from pipeline.norm import SyncBatchNorm
from pipeline.run.assembly import assemble, build_model
from pipeline.run.initial import initialize
from pipeline.world import World
from tests.callbacks.test_statistics import trained
from tests.export.runs import run_of
from tests.models.test_layouts import pixels, their_logits, theirs
from tests.test_cli import refused

SMALL = ["model.stem=small", "model.width=0.125", "data.image_size=16"]


def config(shards, *words: str) -> Config:
    return settled(compose_config(["data=folder", f"data.root={shards}", "data.global_batch_size=24", *words]))


def begun(settings: Config):
    model = build_model(settings)
    return model, initialize(model, settings)


def checkpoint(run: Config):
    return run.directory / "checkpoints" / "step-00000007.ckpt"


def test_a_checkpoint_of_a_run_and_its_export_give_every_tensor(shards, tmp_path):
    run = run_of(shards, tmp_path, *SMALL)
    weights = torch.load(checkpoint(run), weights_only=True)["state_dict"]
    words = ["--format", "safetensors", "--keep-norms", "norm.precise_images=0"]
    assert cli.main(["export", str(run.directory), *words]) == 0
    for file, layout in (
        (checkpoint(run), "checkpoint of a run, step 7"),
        (run.directory / "export" / "safetensors" / "model.safetensors", "export of first"),
    ):
        model, initial = begun(config(shards, *SMALL, f"model.init={file}"))
        assert initial.layout == layout
        assert not initial.new
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights[f"model.{name}"]), name


def test_averaged_weights_are_what_a_run_begins_from_where_there_are_some(shards, tmp_path):
    run = run_of(shards, tmp_path, *SMALL)
    content = torch.load(checkpoint(run), weights_only=True)
    content["averaged"] = {name: tensor + 1 for name, tensor in content["state_dict"].items()}
    torch.save(content, tmp_path / "averaged.ckpt")
    model, initial = begun(config(shards, *SMALL, f"model.init={tmp_path}/averaged.ckpt"))
    assert initial.layout == "checkpoint of a run, step 7, averaged weights"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, content["averaged"][f"model.{name}"]), name


def test_frozen_norms_take_an_average_with_statistics_of_its_own_step_alone(shards, tmp_path):
    """Those that a run keeps are of its last validation, and nothing would estimate them any more."""
    run = trained(shards, tmp_path, 1, "averaging.decay=0.9", "trainer.checkpoint_every_steps=3")
    folder = run.directory / "checkpoints"
    early, frozen = folder / "step-00000003.ckpt", [*SMALL, "norm.frozen=all"]
    refusal = r"of an earlier step's, and norm.frozen = all would keep them; give best.ckpt, or one made by"
    with pytest.raises(ConfigError, match=refusal):
        begun(config(shards, *frozen, f"model.init={early}"))
    begun(config(shards, *SMALL, f"model.init={early}"))
    _, initial = begun(config(shards, *frozen, f"model.init={folder}/best.ckpt"))
    assert initial.layout.endswith("averaged weights")
    assert cli.main(["average", str(run.directory), "--last", "2", "--no-members"]) == 0
    begun(config(shards, *frozen, f"model.init={run.directory}/average.ckpt"))


@pytest.mark.parametrize("words", [["norm.frozen=statistics"], ["recipe=inception"]])
def test_a_run_whose_norms_are_frozen_or_that_has_none_can_be_evaluated(shards, tmp_path, words):
    first = run_of(shards, tmp_path / "first", *SMALL, *[word for word in words if "recipe" in word])
    begin = [f"model.init={checkpoint(first)}"] if "norm.frozen=statistics" in words else []
    run = run_of(shards, tmp_path / "second", *SMALL, *words, *begin)
    assert cli.main(["evaluate", str(run.directory)]) == 0
    assert (run.directory / "evaluation.json").is_file()


def test_with_other_classes_the_last_layer_is_new_and_all_else_is_loaded(shards, tmp_path):
    run = run_of(shards, tmp_path, *SMALL, "data.num_classes=9", "model.auxiliary_head=true")
    settings = config(shards, *SMALL, f"model.init={checkpoint(run)}")
    model, initial = begun(settings)
    assert initial.new == ["classifier"]
    assert initial.left == ["auxiliary"]
    weights = torch.load(checkpoint(run), weights_only=True)["state_dict"]
    torch.manual_seed(settings.seed)
    for name, tensor in model.state_dict().items():
        assert name.startswith("classifier") or torch.equal(tensor, weights[f"model.{name}"]), name
    line = initial.line(settings)
    assert "new: classifier, of 5 classes; left out: auxiliary" in line
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, dir=str(tmp_path), id="second"))
    settings.directory.mkdir()
    initial.keep(settings.directory)
    table = (settings.directory / "initial.csv").read_text().splitlines()
    assert table[0] == "theirs,ours,shape,how"
    assert "body.3a.conv1.conv,body.3a.conv1.conv,8x24x1x1,as it is" in table
    assert ",classifier,,new" in table


@pytest.mark.parametrize("wrapped", ["bare", "model", "state_dict", "ddp"])
def test_torchvisions_files_load_as_they_are(shards, tmp_path, wrapped):
    torch.manual_seed(3)
    weights = resnet18(num_classes=11).state_dict()
    weights = {name: tensor for name, tensor in weights.items() if "tracked" not in name}  # as old files are
    content = {"bare": weights, "model": {"model": weights, "epoch": 89}, "state_dict": {"state_dict": weights},
               "ddp": {f"module.{name}": tensor for name, tensor in weights.items()}}[wrapped]  # fmt: skip
    torch.save(content, tmp_path / "resnet18.pth")
    model, initial = begun(config(shards, "model.name=resnet18", f"model.init={tmp_path}/resnet18.pth"))
    assert initial.new == ["fc"]
    assert any(isinstance(m, SyncBatchNorm) for m in model.modules())
    for name, tensor in model.state_dict().items():
        if not name.startswith("fc.") and "tracked" not in name:
            assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_cadenes_file_gives_its_logits_from_our_pixels(shards, tmp_path, suffix):
    source = theirs(5)
    file = tmp_path / f"bn_inception.{suffix}"
    torch.save(source.state_dict(), file) if suffix == "pth" else save_file(source.state_dict(), file)
    words = ["model.name=bn_inception", "model.stem=dense", "model.literal_fig5=true", "model.count_padding=true",
             "norm.eps=1e-5", f"data.mean={mean_of()}", "data.image_size=64"]  # fmt: skip
    settings = config(shards, *words, f"model.init={file}")
    run = assemble(settings, World())
    initial = initialize(run.classifier.model, settings)
    assert initial.layout == "Cadene's layout"
    assert len(initial.rows) == 70
    unchanged_NV = torch.tensor([[0.0, 1, 1, 1]] * 2, dtype=torch.float64)
    model = run.classifier.model.eval().double()
    with torch.no_grad():
        ours = model(run.classifier.prepare(pixels().byte(), unchanged_NV, torch.float64)).main_NK
    expected = their_logits(source, pixels())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.std()))


def test_cadenes_file_names_every_key_that_it_needs(shards, tmp_path):
    torch.save(theirs(5).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ConfigError) as refusal:
        begun(config(shards, f"model.init={tmp_path}/a.pth"))
    assert (
        "set model.stem=dense model.literal_fig5=true model.count_padding=true norm.eps=1e-05 "
        "data.mean=[0.50196078,0.45882353,0.40784314]"
    ) in str(refusal.value)


def test_what_does_not_fit_is_refused_by_name(shards, tmp_path):
    run = run_of(shards, tmp_path, *SMALL)
    wider = ["model.stem=small", "model.width=0.25", f"model.init={checkpoint(run)}"]
    with pytest.raises(ConfigError, match=r"does not fit bn_inception .*stem.0.conv.weight is 8x3x3x3, here 16x3x3x3"):
        begun(config(shards, *wider))
    torch.save({"a": torch.zeros(2), "b": 3}, tmp_path / "odd.pth")
    with pytest.raises(ConfigError, match="holds a, b, and no tensors by name"):
        begun(config(shards, *SMALL, f"model.init={tmp_path}/odd.pth"))
    torch.save({0: torch.zeros(2), 1: torch.zeros(2)}, tmp_path / "numbered.pth")
    with pytest.raises(ConfigError, match="holds 0, 1, and no tensors by name"):
        begun(config(shards, *SMALL, f"model.init={tmp_path}/numbered.pth"))
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"is missing.* and \d+ more; set model"):
        begun(config(shards, *SMALL, f"model.init={tmp_path}/other.pth"))
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=r"model.init: .*bad.pth is damaged, or holds more than tensors"):
        begun(config(shards, *SMALL, f"model.init={tmp_path}/bad.pth"))
    assert cli.main(["export", str(run.directory), "--format", "safetensors"]) == 0
    file = run.directory / "export" / "safetensors" / "model.safetensors"
    with pytest.raises(ConfigError, match="has its norms folded, and cannot be trained on"):
        begun(config(shards, *SMALL, f"model.init={file}"))


def test_a_run_is_told_by_what_the_file_holds_not_by_where_it_lies(shards, tmp_path):
    run = run_of(shards, tmp_path, *SMALL)
    first, second = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    first.write_bytes(checkpoint(run).read_bytes())
    second.write_bytes(checkpoint(run).read_bytes())
    left, right = (config(shards, *SMALL, f"model.init={file}") for file in (first, second))
    assert identity(left) == identity(right)
    torch.save({"other": torch.zeros(1)}, second)
    other = config(shards, *SMALL, f"model.init={second}")
    assert [line.partition(" =")[0] for line in differences(other, left)] == ["model.init_digest"]
    assert not differences(completed(left, model={"init_digest": ""}), left)  # typed again, not looked at yet
    assert differences(left, config(shards, *SMALL))
    torch.save({"other": torch.zeros(1)}, first)
    with pytest.raises(ConfigError, match="is another file than the run was made with"):
        begun(left)


def test_a_file_that_is_not_there_and_frozen_norms_of_nothing_are_one_line(shards, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    here = ["train", "data=folder", f"data.root={shards}", "data.global_batch_size=24"]
    line = refused(capsys, 2, *here, "model.init=nowhere.pth")
    assert "model.init = nowhere.pth is no file; give the .safetensors, .pth or .ckpt file to begin from" in line
    assert "give the weights they belong to, model.init=FILE" in refused(capsys, 2, *here, "norm.frozen=all")
    line = refused(capsys, 2, *here, "norm.frozen=all", "norm.compare=true", "model.init=a.pth")
    assert "norm.compare = true finds no running averages where norm.frozen = all; leave either out" in line
    assert "norm.frozen = 'al' is not offered; did you mean all?" in refused(capsys, 2, *here, "norm.frozen=al")
