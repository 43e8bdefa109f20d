"""Results: measured once for a request, told from their numbers, on pages that need nothing else."""

import json
import re

import numpy as np
import pytest

from pipeline.experiments.experiment import Experiment, Finding, Setting, Table
from pipeline.experiments.markdown import markdown, write_markdown
from pipeline.experiments.page import page, write_pictures
from pipeline.experiments.result import RESULT, kept, measured, read_result
from pipeline.report.chart import Chart, Line, compact

EVIL = '<b>5 | 6 & "7"</b>'


def tell(found):
    line = Line("measured", np.arange(3.0), np.array(found["values"]), 0)
    return Finding(
        found["holds"], f"The values are {found['values']}, {EVIL}.",
        [Table("Values", ["which", "value"], [[EVIL, str(v)] for v in found["values"]], "Of no unit.")],
        [Chart("made-values", "Values", "place", [line], compact)], ["Made up."],
    )  # fmt: skip


def made(holds=True, name="made"):
    calls = []

    def measure(setting):
        calls.append(setting)
        return {"values": [float(setting.seeds), 2.0, 3.0], "holds": holds}

    return Experiment(name, f"Things are {name}", f"Values are {EVIL}.", "Nobody 2026", 0.1, 1, "the same", measure,
                      tell), calls  # fmt: skip


def test_what_is_asked_again_is_kept_and_what_is_asked_anew_is_not(tmp_path):
    experiment, calls = made()
    first = measured(experiment, Setting(2, tmp_path / "work"), tmp_path / "made", "command")
    again = kept(experiment, Setting(2, tmp_path / "work"), tmp_path / "made")
    assert len(calls) == 1
    assert again is not None
    assert again.measured == first.measured
    for other in (Setting(3, tmp_path / "work"), Setting(2, tmp_path / "work", data={"mnist": "here"}),
                  Setting(2, tmp_path / "work", full=True)):  # fmt: skip
        assert kept(experiment, other, tmp_path / "made") is None


def test_a_result_holds_all_that_was_measured_and_how(tmp_path):
    experiment, _ = made()
    measured(experiment, Setting(2, tmp_path / "work"), tmp_path / "made", "pipeline reproduce made")
    content = json.loads((tmp_path / "made" / RESULT).read_text())
    assert content["measured"] == {"values": [2.0, 2.0, 3.0], "holds": True}
    assert content["command"] == "pipeline reproduce made"
    assert set(content["asked"]["versions"]) >= {"pipeline", "torch", "numpy"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"])
    assert content["holds"] is True


@pytest.mark.parametrize(
    "content", ['{"format": 99}', '{"format": 1, "experiment": "another"}', "{}", '{"format": 1,', "[]"]
)
def test_a_result_of_another_kind_is_none(tmp_path, content):
    experiment, _ = made()
    (tmp_path / RESULT).write_text(content)
    assert read_result(experiment, tmp_path) is None


def results(tmp_path):
    found = []
    for name, holds in (("first", True), ("second", False), ("third", None)):
        experiment, _ = made(holds, name)
        found.append(measured(experiment, Setting(1, tmp_path / "work" / name), tmp_path / name, f"reproduce {name}"))
    return found


def test_a_page_of_several_says_each_verdict_and_links_to_it(tmp_path):
    text = page(results(tmp_path), "command")
    for name in ("first", "second", "third"):
        assert text.count(f'href="#{name}"') == 1
        assert text.count(f'id="{name}"') == 1
    assert "3 claims" in text
    assert "1 hold here, 1 does not, 1 is open" in text
    assert EVIL not in text
    assert "http" not in re.sub(r"http-equiv", "", text)


def test_a_page_of_one_has_its_table_its_picture_and_its_remark(tmp_path):
    text = page(results(tmp_path)[:1], "command")
    for part in ("Things are first", "Nobody 2026", "holds here", "<svg", "Made up.", "Of no unit.", "reproduce first"):
        assert part in text


def test_pictures_of_an_earlier_result_go(tmp_path):
    experiment, _ = made()
    result = measured(experiment, Setting(1, tmp_path / "work"), tmp_path / "made", "c")
    (tmp_path / "made" / "made-old.png").write_bytes(b"")
    assert [path.name for path in write_pictures(result, tmp_path / "made")] == ["made-values.png"]
    assert [path.name for path in (tmp_path / "made").glob("*.png")] == ["made-values.png"]


def test_markdown_keeps_cells_apart_and_leads_to_each_section(tmp_path):
    found = results(tmp_path)
    text = markdown(found, "experiments")
    assert "| [first](#things-are-first) | holds here |" in text
    assert r"5 \| 6" in text
    write_markdown(found[:1], tmp_path / "experiments.md")
    assert (tmp_path / "experiments" / "made-values.png").is_file()
