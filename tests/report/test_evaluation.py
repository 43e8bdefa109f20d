"""The page of an evaluation: complete, of itself, and true to the predictions."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.truth import one_label, several_labels
from pipeline.report.evaluation import Evaluated, make_evaluation_page
from tests.report.test_page import CHROMIUM, EVIL, Page

NAMES = ["cat", "dog", "hare"]
PROBABILITY_NK = np.array([
    [0.8, 0.1, 0.1],
    [0.3, 0.6, 0.1],  # a cat, taken for a dog
    [0.9, 0.05, 0.05],  # a dog, taken for a cat
    [0.1, 0.7, 0.2],
    [0.05, 0.15, 0.8],
])  # fmt: skip
LABEL_N = np.array([0, 0, 1, 1, 2])


def png(place: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (place * 40, 0, 0)).save(file, "PNG")
    return file.getvalue()


def evaluated(**more: object) -> Evaluated:
    keys = [f"val/{number}" for number in range(len(LABEL_N))]
    plain = Evaluated("first", [("top-1", "60 %")], NAMES, keys, one_label(LABEL_N, 3), PROBABILITY_NK)
    return replace(plain, **more)


def made(tmp_path: Path, what: Evaluated) -> Page:
    return Page(make_evaluation_page(what, tmp_path / "out", command="pipeline evaluate", now=datetime.now(tz=UTC)))


def test_a_page_names_its_facts_its_classes_and_what_they_are_taken_for(tmp_path):
    members = (["network", "top-1 error"], [["a", "40 %"], ["ensemble", "20 %"]])
    page = made(tmp_path, evaluated(notes=["one image could not be read"], members=members))
    for text in ("60 %", "one image could not be read", "ensemble", "dog (1)", "cat (1)", "All 3 classes",
                 "cat, 90.0%", "is dog", "val/2"):  # fmt: skip
        assert text in page.text
    assert page.text.index("cat, 90.0%") < page.text.index("dog, 60.0%")  # the most confident mistake first
    assert len(page.of("svg")) == 4


def test_a_page_asks_for_nothing_outside_of_itself(tmp_path):
    page = made(tmp_path, evaluated(picture=png))
    policy = page.of("meta")[1]["content"]
    assert policy.startswith("default-src 'none'")
    sources = [image["src"] for image in page.of("img")]
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not page.of("link")
    assert not re.search(r"https?:|url\(|@import|fetch\(", page.source.replace("http://www.w3.org", ""))


def test_names_and_keys_are_text_whatever_they_are(tmp_path):
    page = made(tmp_path, evaluated(names=[EVIL, EVIL, EVIL], keys=[EVIL] * 5, title=EVIL, notes=[EVIL]))
    assert escape(EVIL) in page.source
    assert len(page.of("script")) == 1


def test_the_table_of_all_classes_is_there_for_other_programs(tmp_path):
    made(tmp_path, evaluated())
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == NAMES
    assert [int(row["right"]) for row in rows] == [1, 1, 1]
    assert [int(row["answered"]) for row in rows] == [2, 2, 1]


def test_images_without_a_right_answer_are_said_to_be_left_out(tmp_path):
    truth = several_labels(LABEL_N, [[0], [0, 1], [], [1], [2]], 3)
    page = made(tmp_path, evaluated(truth=truth))
    assert "1 images have no right answer by these labels, and do not count" in page.text
    assert "None." in page.text  # the second is right now, the third does not count


def test_without_mistakes_the_page_says_so(tmp_path):
    page = made(tmp_path, evaluated(probability_NK=np.eye(3)[LABEL_N]))
    assert "Nothing: every image is right." in page.text
    assert "None." in page.text


def test_a_thousand_classes_are_a_page_below_a_megabyte(tmp_path):
    rng = np.random.default_rng(0)
    label_N = np.arange(3000) % 1000
    what = evaluated(truth=one_label(label_N, 1000), probability_NK=rng.dirichlet(np.full(1000, 0.1), 3000))
    made(tmp_path, replace(what, keys=list(map(str, range(3000))), names=[f"class {n}" for n in range(1000)]))
    assert (tmp_path / "out" / "index.html").stat().st_size < 1e6


def test_the_page_needs_no_torch(tmp_path):
    code = "import sys, pipeline.report.evaluation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it_without_a_complaint(tmp_path):
    page = make_evaluation_page(evaluated(picture=png), tmp_path, command="pipeline", now=datetime.now(tz=UTC))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         "--virtual-time-budget=2000", "--dump-dom", f"file://{page}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert 'class="tip"' in done.stdout  # the script ran
