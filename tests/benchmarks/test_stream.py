import io
from functools import partial

import numpy as np
import pytest
from rich.console import Console

from pipeline.benchmarks import crops
from pipeline.benchmarks.rounds import Contender, Round, Row, best_peer, machine, measured, ratios, versions
from pipeline.benchmarks.stream import Fidelity, Result, compare, fidelity, report, verdict, write_csv
from pipeline.cli import main
from pipeline.data import decode
from pipeline.data.augment import Augmentation
from pipeline.data.dataset import Location, open_dataset
from pipeline.data.shards import DataError
from tests.conftest import noise_image


def prepared(rounds_it_survives: int, task: int):
    if task < 0:
        raise ImportError("No module named 'peer'", name="peer")

    def work(number: int) -> int:
        if number > rounds_it_survives:
            raise RuntimeError("gave up\nwith details")
        return task

    return work


def absent(task: int):
    return prepared(0, -task)


def row(name: str, *rates: float, peer: bool = True) -> Row:
    return Row(name, name, peer, [Round(100, 100 / rate, 50 / rate) for rate in rates])


def test_every_contender_has_a_row_and_one_that_is_missing_or_fails_says_why():
    contenders = [
        Contender("sound", "", partial(prepared, 9)),
        Contender("absent", "", absent),
        Contender("failing", "", partial(prepared, 1)),
    ]
    seen = []
    rows = measured(contenders, 7, 2, lambda done, total: seen.append((done, total)))
    assert [(r.name, r.missing, len(r.rounds)) for r in rows] == [
        ("sound", "", 2), ("absent", "not installed (peer)", 0), ("failing", "failed: RuntimeError: gave up", 0),
    ]  # fmt: skip
    assert all(r.images == 7 for r in rows[0].rounds)
    assert seen[-1] == (9, 9)


def test_ratios_are_taken_round_by_round_and_the_best_peer_is_not_ours():
    rows = [
        row("ours", 300, 200, 100, peer=False), row("slow", 50, 50, 50), row("webdataset-pillow", 100, 50, 50),
        row("entropy", 400, 400, 200, peer=False), Row("absent", "", True, missing="not installed (peer)"),
    ]  # fmt: skip
    assert rows[0].rates == pytest.approx([300, 200, 100])
    assert rows[0].wall_rate == pytest.approx(400)
    assert ratios(rows[0], rows[2]) == pytest.approx([3, 4, 2])
    assert best_peer(rows) is rows[1]  # by the median; the other's first round was a lucky one
    assert best_peer(rows[:1]) is None
    assert verdict(rows) == [
        "ours / best packaged peer (slow) 4.00 (2.00-6.00)", "ours / floor 0.50 (0.50-0.75)",
        "ours / webdataset + Pillow 3.00 (2.00-4.00)",
    ]  # fmt: skip
    assert verdict(rows[1:]) == []


def test_the_tables_name_what_is_missing_and_the_file_holds_every_round(tmp_path):
    rows = [row("ours", 300, 200, peer=False), Row("dali", "DALI", True, missing="not installed (nvidia)")]
    result = Result(224, 10, 1, rows, [row("timm", 100, 90)], Fidelity(10, 2, 1.25, 30, 1))
    console = Console(record=True, width=140, file=io.StringIO())
    report(result, console)
    text = console.export_text()
    for words in (
        "1 skipped for all", "250 (200-300)", "DALI: not installed (nvidia)", "95 (90-100)", "2 (20.0%) decoded at 1/2",
        machine().split(",")[0],
    ):  # fmt: skip
        assert words in text
    write_csv(result, tmp_path / "rounds.csv")
    lines = (tmp_path / "rounds.csv").read_text().splitlines()
    assert len(lines) == 1 + 4
    assert lines[1].startswith("crops,ours,1,100,0.333")
    assert "no-such-thing" not in versions(["torch", "no-such-thing"])


def test_ours_and_webdataset_stream_the_same_shards(shards):
    dataset = open_dataset(Location(str(shards)))
    only = ("ours", "webdataset-pillow")
    result = compare(dataset, split="train", images=40, rounds=1, size=32, batch=16, only=only)
    assert [r.name for r in result.crops] == ["ours"]
    assert [r.name for r in result.stream] == list(only)
    assert all(not r.missing for r in result.crops + result.stream)
    assert result.images + result.skipped == 40
    assert result.skipped > 0  # PNG
    assert result.crops[0].rounds[0].images == result.images
    assert result.stream[0].rounds[0].images == 32  # whole batches
    assert result.stream[1].rounds[0].images >= 32


def test_a_round_needs_a_batch(shards):
    with pytest.raises(DataError, match="--batch 64 exceeds the 40 images"):
        compare(open_dataset(Location(str(shards))), split="train", images=40, rounds=1, size=32, batch=64)


@pytest.fixture
def payloads() -> list[bytes]:
    return [noise_image(seed, 200 + 60 * seed, 180, "JPEG") for seed in range(6)]


def made(crop: crops.Crop, payloads: list[bytes], number: int = 3) -> np.ndarray:
    return np.stack([crop(payload, crops.key_of(number, i)) for i, payload in enumerate(payloads)]).astype(int)


def test_ours_gives_the_same_bits_without_the_extension(payloads, monkeypatch):
    augment = Augmentation(size=64)
    expected = made(crops.ours(augment), payloads)
    monkeypatch.setattr(decode, "jpeg_region", decode.jpeg_region)  # restored afterwards
    assert np.array_equal(made(crops.ours_plain(augment), payloads), expected)
    assert decode.jpeg_region is None


@pytest.mark.parametrize(
    ("peer", "module"),
    [
        (crops.pillow, "torchvision"), (crops.torchvision, "torchvision"), (crops.simplejpeg_opencv, "cv2"),
        (crops.nvimgcodec, "nvidia.nvimgcodec"),
    ],
)  # fmt: skip
def test_contenders_show_the_same_part_of_the_image(payloads, peer, module):
    pytest.importorskip(module)
    augment = Augmentation(size=48)
    theirs = made(peer(augment), payloads)
    assert np.abs(theirs - made(crops.ours(augment), payloads)).mean() < 2  # of 255
    assert np.abs(theirs - made(crops.ours(augment), payloads, number=4)).mean() > 20  # another part of the image


def test_pixels_are_those_of_the_long_way_within_a_level(payloads):
    found = fidelity(payloads, 48)
    assert found.crops == 6
    assert 0 < found.scaled < 6
    assert found.pillow_max <= 1
    assert 0 < found.scaled_mean < 2


def test_the_verb_refuses_what_it_does_not_know(capsys):
    assert main(["bench", "stream", "shards", "--only", "ours,nobody"]) == 2
    assert "--only nobody is no contender; choose from ours, " in capsys.readouterr().err
    with pytest.raises(SystemExit) as refusal:
        main(["bench", "stream", "shards", "--repeats", "4"])
    assert refusal.value.code == 2
    assert "fewer rounds show no spread" in capsys.readouterr().err
