"""A run's network in every format: the file computes what the network does, and its norms are gone."""

import json
import os
import re
import runpy
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline import cli
from pipeline.export import ExportError, graph, load, onnx_file, publication
from pipeline.export.description import Description, Preprocessing, parse
from pipeline.export.weights import read_tensors
from pipeline.norm import PerActivationNorm
from pipeline.norm.apart import statistics_of
from pipeline.run import evaluating, exporting
from tests.conftest import noise_image
from tests.export.runs import NETWORKS, run_of
from tests.test_cli import refused

FILES = {"safetensors": "model.safetensors", "torch-export": "model.pt2", "onnx": "model.onnx"}


@pytest.fixture(scope="module", params=NETWORKS)
def run(request, shards, tmp_path_factory):
    return run_of(shards, tmp_path_factory.mktemp("runs"), *NETWORKS[request.param])


@pytest.mark.parametrize("form", FILES)
def test_an_exported_file_computes_what_the_network_does_and_says_so(run, form, capsys, tmp_path):
    place = tmp_path / form
    assert cli.main(["export", str(run.directory), "--format", form, "--output", str(place), "--images", "9"]) == 0
    said = capsys.readouterr().out
    difference = float(re.search(r"within ([\d.e+-]+)\s", said)[1])
    assert 0 <= difference <= (1e-4 if run.model.name == "resnet50" else 1e-5)  # untrained, it rounds by 1e-5 itself
    assert sorted(p.name for p in place.iterdir()) == sorted(["README.md", "model.json", FILES[form]])
    described = parse((place / "model.json").read_text(), "model.json")
    assert described.name == run.model.name
    assert described.norms == "folded"
    assert [name for _, name in described.classes] == [f"class{label}" for label in range(5)]
    assert str(tmp_path) not in (place / FILES[form]).read_bytes().decode("latin-1")  # nor any other place here
    assert b"/pipeline/models/" not in (place / FILES[form]).read_bytes()
    if form == "onnx":
        kinds = onnx_file.kinds(place / FILES[form])
        assert "BatchNormalization" not in kinds
        expected = {"bn_inception": 69 + (run.model.stem == "separable"), "inception": 69, "resnet50": 53}
        assert kinds["Conv"] == expected[run.model.name]
        model = onnx.load(place / FILES[form])
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert parse({p.key: p.value for p in model.metadata_props}["pipeline"], form) == described
    if form == "safetensors":
        with safe_open(place / FILES[form], "pt") as file:
            assert not any("running" in name or name.startswith("auxiliary") for name in file.keys())  # noqa: SIM118
            assert parse(file.metadata()["pipeline"], form) == described


@pytest.mark.parametrize("form", ["torch-export", "onnx"])
def test_a_graph_takes_any_number_of_images_and_normalized_ones_if_asked(shards, tmp_path, form):
    config = run_of(shards, tmp_path, "model.stem=small", "model.width=0.125", "data.image_size=16")
    outputs = {}
    for takes in ("pixels", "normalized"):
        place = tmp_path / takes
        words = ["--format", form, "--input", takes, "--output", str(place)]
        assert cli.main(["export", str(config.directory), *words]) == 0
        run = (graph if form == "torch-export" else onnx_file).load(place / FILES[form])[0]
        pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.data.mean, config.data.std))
        images = pixels if takes == "pixels" else (pixels / 255 - mean) / std
        whole = run(images)
        torch.testing.assert_close(torch.cat([run(images[:1]), run(images[1:])]), whole, rtol=1e-5, atol=1e-5)
        outputs[takes] = whole
    torch.testing.assert_close(outputs["pixels"], outputs["normalized"], rtol=1e-4, atol=1e-4)


def test_statistics_have_the_bits_of_an_evaluation_or_are_the_running_ones(shards, tmp_path):
    config = run_of(shards, tmp_path, "model.stem=small", "model.width=0.125", "data.image_size=16")
    assert cli.main(["evaluate", str(config.directory)]) == 0
    (file,) = (config.directory / "evaluation").glob("*/statistics.npz")
    state = torch.load(config.directory / "checkpoints" / "step-00000007.ckpt", weights_only=True)["state_dict"]
    networks = {}
    for name, words in (("estimated", []), ("running", ["norm.precise_images=0"])):
        words += ["--format", "safetensors", "--keep-norms", "--output", str(tmp_path / name)]
        assert cli.main(["export", str(config.directory), *words]) == 0
        networks[name], description = load(tmp_path / name / "model.safetensors")
        assert description.norms == "kept"
    evaluated = torch.from_numpy(np.load(file)["values"])
    assert torch.equal(statistics_of(networks["estimated"].network), evaluated)
    running = networks["running"].network.state_dict()["stem.0.norm.running_mean"]
    assert torch.equal(running, state["model.stem.0.norm.running_mean"])
    assert "top-1" in (tmp_path / "estimated" / "README.md").read_text()
    assert " images, 1 view each" in (tmp_path / "estimated" / "README.md").read_text()


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_statistics_are_estimated_by_algorithms_as_an_evaluations_are(shards, tmp_path, monkeypatch, is_deterministic):
    words = ["model.stem=small", "model.width=0.125", "data.image_size=16"]
    config = run_of(shards, tmp_path, *words, f"trainer.deterministic={str(is_deterministic).lower()}")
    seen = {}

    def spied(place):
        estimate = place.estimate_apart

        def estimate_apart(*given, **how):
            seen[place] = torch.are_deterministic_algorithms_enabled()
            return estimate(*given, **how)

        monkeypatch.setattr(place, "estimate_apart", estimate_apart)

    before = torch.are_deterministic_algorithms_enabled()
    try:
        for place, verb in ((evaluating, ["evaluate"]), (exporting, ["export", "--format", "safetensors"])):
            spied(place)
            torch.use_deterministic_algorithms(not is_deterministic)
            assert cli.main([verb[0], str(config.directory), *verb[1:]]) == 0
        assert torch.are_deterministic_algorithms_enabled() is not is_deterministic  # given back
    finally:
        torch.use_deterministic_algorithms(before)
    assert seen == {evaluating: is_deterministic, exporting: is_deterministic}


@pytest.mark.parametrize(("form", "takes"), [(f, "pixels") for f in FILES] + [("onnx", "normalized")])
def test_the_snippet_of_a_model_card_runs_and_gives_the_networks_answer(
    shards, tmp_path, monkeypatch, capsys, form, takes
):
    small = ["model.stem=small", "model.width=0.125", "data.image_size=16", "data.evaluation_crop=1.0"]
    config = run_of(shards, tmp_path, *small)
    place = tmp_path / "card"
    assert cli.main(["export", str(config.directory), "--format", form, "--output", str(place), "--input", takes]) == 0
    text = (place / "README.md").read_text()
    for fact in (config.data.digest, "bn_x5", "step-00000007.ckpt", "torch ", "Apache-2.0", "probabilities within"):
        assert fact in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (place / "photo.jpg").write_bytes(noise_image(3, 16, 16, "PNG"))  # exact pixels, whatever the name says
    (place / "snippet.py").write_text(code)
    monkeypatch.chdir(place)
    capsys.readouterr()
    found = runpy.run_path("snippet.py")["logits"].softmax(1)
    words = ["--format", "safetensors", "--output", str(tmp_path / "other")]
    assert cli.main(["export", str(config.directory), *words]) == 0
    pixels = torch.from_numpy(np.asarray(Image.open("photo.jpg").convert("RGB")).copy()).permute(2, 0, 1)[None]
    expected = load(tmp_path / "other" / "model.safetensors")[0](pixels).softmax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_run_in_cadenes_layout_is_the_same_network_under_their_names(shards, tmp_path, monkeypatch):
    options = ["model.stem=dense", "model.literal_fig5=true", "model.count_padding=true", "data.image_size=32"]
    config = run_of(shards, tmp_path, *options)
    place = tmp_path / "cadene"
    words = ["--format", "cadene", "--output", str(place), "--images", "4"]
    assert cli.main(["export", str(config.directory), *words]) == 0
    tensors, header = read_tensors(place / "model.safetensors")
    assert tensors["conv1_7x7_s2.bias"].shape == (64,)
    settings = json.loads(header["pretrained_settings"])
    assert settings["input_space"] == "BGR"
    assert settings["mean"] == pytest.approx([255 * 0.406, 255 * 0.456, 255 * 0.485])
    table = (place / "layout.csv").read_text().splitlines()
    assert table[1].startswith('"conv1_7x7_s2, conv1_7x7_s2_bn",stem.0,64x3x7x7,"RGB to BGR, our scale to 0..255')
    assert len(table) == 71
    code = re.search(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)[1]
    (place / "photo.jpg").write_bytes(noise_image(3, 40, 36))
    monkeypatch.chdir(place)
    (place / "snippet.py").write_text(code)
    left = runpy.run_path("snippet.py")
    assert left["weights"].keys() == tensors.keys()
    assert left["images"].shape == (1, 3, 32, 32)
    assert left["images"].dtype == np.float32


@pytest.mark.parametrize("size", [16, 40, 112])
def test_sides_that_do_not_halve_evenly_are_not_cadenes_and_that_is_said_before_the_work(
    shards, tmp_path, monkeypatch, capsys, size
):
    options = ["model.stem=dense", "model.literal_fig5=true", "model.count_padding=true", f"data.image_size={size}"]
    config = run_of(shards, tmp_path, *options)
    monkeypatch.setattr(exporting, "export", None)
    line = refused(capsys, 1, "export", str(config.directory), "--format", "cadene")
    assert f"data.image_size = {size} does not halve evenly five times" in line
    assert not (config.directory / "export").exists()


@pytest.mark.slow
def test_speed_is_measured_beside_eager_and_compiled_pytorch_and_stands_in_the_card(
    shards, tmp_path, monkeypatch, capsys
):
    config = run_of(shards, tmp_path, "model.stem=small", "model.width=0.125", "data.image_size=16")
    monkeypatch.setattr("pipeline.export.speed.SECONDS", 0.001)
    assert cli.main(["export", str(config.directory), "--format", "onnx", "--speed"]) == 0
    said, text = capsys.readouterr().out, (config.directory / "export" / "onnx" / "README.md").read_text()
    assert "1 threads of" in said
    for form in ("eager", "eager, folded", "torch.compile, folded", "onnx"):
        assert form in said
        for batch in (1, 8):
            assert re.search(rf"\| {form} \| {batch} \| [\d.,]+ \| [\d.,]+ to [\d.,]+ \| 10 \|", text)


def test_a_rival_that_does_not_run_is_left_out_and_the_file_is_kept(shards, tmp_path, monkeypatch, capsys):
    config = run_of(shards, tmp_path, "model.stem=small", "model.width=0.125", "data.image_size=16")

    def compiled(network, **how):
        def run(images):
            raise RuntimeError("No working C++ compiler found in [['g++']]\nmore of it")

        return run

    monkeypatch.setattr("torch.compile", compiled)
    monkeypatch.setattr("pipeline.export.speed.SECONDS", 0.001)
    assert cli.main(["export", str(config.directory), "--format", "torch-export", "--speed"]) == 0
    said, text = capsys.readouterr().out, (config.directory / "export" / "torch-export" / "README.md").read_text()
    reason = "No working C++ compiler found in [['g++']]"
    assert f"--speed leaves out torch.compile, folded, which does not run here: {reason}\n" in said
    assert "more of it" not in said
    assert "| eager, folded | 8 |" in text
    assert "| torch-export | 8 |" in text
    assert "compile, folded |" not in text


def test_a_signal_ends_an_export_while_a_rival_compiles(shards, tmp_path, monkeypatch, capsys):
    config = run_of(shards, tmp_path, "model.stem=small", "model.width=0.125", "data.image_size=16")

    def compiled(network, **how):
        def run(images):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

        return run

    monkeypatch.setattr("torch.compile", compiled)
    line = refused(capsys, 1, "export", str(config.directory), "--format", "safetensors", "--speed")
    assert line == "pipeline: interrupted"
    assert not list((config.directory / "export").iterdir())


def test_a_file_that_computes_something_else_is_not_kept(shards, tmp_path, monkeypatch, capsys):
    config = run_of(shards, tmp_path, "model.stem=small", "model.width=0.125", "data.image_size=16")
    faithful = exporting.folded

    def unfaithful(network):
        folded = faithful(network)
        folded.classifier.bias[0] += 1e-3
        return folded

    monkeypatch.setattr(exporting, "folded", unfaithful)
    line = refused(capsys, 1, "export", str(config.directory), "--format", "safetensors")
    assert "safetensors of first is not kept: its probabilities differ by up to" in line
    assert not list((config.directory / "export").iterdir())


def test_what_is_asked_wrongly_is_one_line(shards, tmp_path, monkeypatch, capsys):
    config = run_of(shards, tmp_path, "model.stem=small", "model.width=0.125", "data.image_size=16")
    here = ["export", str(config.directory)]
    assert "is no run" in refused(capsys, 2, "export", str(tmp_path), "--format", "onnx")
    assert "--keep-norms is of --format safetensors; onnx has them folded" in refused(
        capsys, 2, *here, "--format", "onnx", "--keep-norms"
    )
    assert "--input is of torch-export and onnx" in refused(
        capsys, 2, *here, "--format", "safetensors", "--input", "normalized"
    )
    assert "--checkpoint best: there is none" in refused(capsys, 2, *here, "--format", "onnx", "--checkpoint", "best")
    assert (
        "model.stem = small, model.literal_fig5 = False, model.count_padding = False, model.width = 0.125"
        in refused(capsys, 1, *here, "--format", "cadene")
    )
    assert not (config.directory / "export").exists()
    place = tmp_path / "other"
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")
    line = refused(capsys, 1, *here, "--format", "safetensors", "--output", str(place), "--force")
    assert "is there and no export: thesis.tex is not of one; choose another place with --output" in line
    assert (place / "thesis.tex").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    line = refused(capsys, 1, *here, "--format", "onnx")
    assert "not installed, and needed for --format onnx: onnxscript; pip install -r requirements/onnx.txt, or" in line


def test_norms_of_single_activations_are_kept_where_asked_and_are_not_cadenes(shards, tmp_path, capsys):
    config = run_of(shards, tmp_path, *NETWORKS["single activations"])
    here = ["export", str(config.directory), "--images", "4"]
    assert cli.main([*here, "--format", "safetensors", "--keep-norms"]) == 0
    network, _ = load(config.directory / "export" / "safetensors" / FILES["safetensors"])
    assert sum(isinstance(module, PerActivationNorm) for module in network.modules()) == 14
    assert "model.per_activation = 2 is not of that layout" in refused(capsys, 1, *here, "--format", "cadene")


def described(name: str, **options: object) -> str:
    return Description(name, options, 2, Preprocessing(16, 1.0, [0.5] * 3, [0.2] * 3)).to_json()


def test_an_export_is_replaced_only_by_force_and_never_by_half(tmp_path):
    place = tmp_path / "export" / "onnx"
    with publication.published(place, force=False) as temporary:
        (temporary / "model.json").write_text(described("first"))
        assert not place.exists()
    with pytest.raises(ExportError, match="holds an export; replace it with --force"):
        publication.check_free(place, force=False)

    def interrupted() -> None:
        with publication.published(place, force=True) as temporary:
            (temporary / "model.json").write_text(described("second"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (place / "model.json").read_text() == described("first")
    with publication.published(place, force=True) as temporary:
        (temporary / "model.json").write_text(described("second"))
    assert (place / "model.json").read_text() == described("second")
    assert [p.name for p in place.parent.iterdir()] == ["onnx"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.json", '{"layers": 3}', "model.json is not of one"),  # another program's
        ("model.json", '{"format": "pipeline-export/9"}', "model.json is not of one"),
        ("model.json", "", "model.json is not of one"),
        ("thesis.tex", "years of work", "thesis.tex is not of one"),
        ("data/shard.tar", "years of work", "data is not of one"),
    ],
)
def test_force_removes_no_directory_that_holds_anything_but_an_export(tmp_path, name, content, said):
    place = tmp_path / "other"
    with publication.published(place, force=False) as temporary:
        (temporary / "model.json").write_text(described("first"))
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text(content)
    with pytest.raises(ExportError, match=f"is there and no export: {said}; choose another place"):
        publication.check_free(place, force=True)
    assert (place / name).read_text() == content


def test_the_directory_that_one_is_in_is_refused_before_the_work_and_a_way_through_it_is_not(
    shards, tmp_path, monkeypatch, capsys
):
    config = run_of(shards, tmp_path, "model.stem=small", "model.width=0.125", "data.image_size=16")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = ["export", str(config.directory), "--format", "safetensors", "--images", "4", "--output"]
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "export", None)
        for place in (".", "..", "/"):
            line = refused(capsys, 1, *words, place)
            assert f"{Path(place).resolve()} holds the directory that you are in" in line
    assert cli.main([*words, "../here/../there/."]) == 0
    assert (tmp_path / "there" / "model.safetensors").is_file()
    (tmp_path / "link").symlink_to("there")
    assert cli.main([*words, "../link", "--force"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "here", "link", "there"]


def test_what_comes_to_the_place_while_an_export_is_made_stays(tmp_path):
    place = tmp_path / "export"

    def late() -> None:
        with publication.published(place, force=True) as temporary:
            (temporary / "model.json").write_text(described("first"))
            place.mkdir()
            (place / "thesis.tex").write_text("years of work")

    with pytest.raises(ExportError, match=r"thesis\.tex is not of one"):
        late()
    assert (place / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_files_that_are_no_export_are_refused_by_what_they_are(tmp_path):
    for name, content, said in (
        ("a.safetensors", b"garbage", "is no whole safetensors file"),
        ("a.pth", b"garbage", "is damaged, or holds more than tensors"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ExportError, match=said):
            load(tmp_path / name)
    with pytest.raises(ExportError, match="No such file"):
        load(tmp_path / "none.safetensors")
    for name, options, said in (("bn_conception", {}, "is not a model"), ("bn_inception", {"depth": 3}, "depth")):
        header = {"pipeline": described(name, **options)}
        save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", header)
        with pytest.raises(ExportError, match=f"describes a network that this version cannot build .*{said}"):
            load(tmp_path / "b.safetensors")
    with pytest.raises(ExportError, match="describes no network"):
        parse("{}", "model.json")
    with pytest.raises(ExportError, match="of format pipeline-export/9, this version reads"):
        parse(json.dumps({"format": "pipeline-export/9"}), "model.json")
