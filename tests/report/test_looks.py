"""What was seen inside networks is drawn side by side, and what a crash left half-written is left out."""

import numpy as np
import pytest

from pipeline.callbacks import gradients, histogram
from pipeline.report import looks
from pipeline.report.looks import read_gradients, read_percentiles
from pipeline.report.making import make_report
from pipeline.report.record import read_run
from tests.report.runs import simple


def counts(*powers: float) -> str:
    """One value of each magnitude, with alternating signs."""
    signed = [10.0**power * (-1) ** i for i, power in enumerate(powers)]
    return " ".join(map(str, np.histogram(signed, histogram.EDGES_E)[0]))


@pytest.fixture
def runs(tmp_path):
    paths = [simple(tmp_path / name) for name in ("bare", "normalized")]
    for factor, path in enumerate(paths, 1):
        (path / "percentiles.csv").write_text(
            "step,layer,unit,p15,p50,p85\n"
            + "".join(f"{step},hidden.norm,{unit},{-factor},0,{step * factor}\n"
                      for step in (10, 20, 30) for unit in ("7", "all"))
            + "40,hidden.norm,7,-1"
        )  # fmt: skip
        (path / "gradients.csv").write_text(
            ",".join(gradients.COLUMNS) + "\n"
            f"10,hidden.linear,4,0.1,3,5,{counts(-1.1)}\n"
            f"20,hidden.linear,4,0.25,4.5,5,{counts(-4.1, -4.1, -2.1, -2.1)}\n"
            f"20,classifier,4,0.1,nan,5,{counts(-3.1)}\n30,classifier,4,0.1"
        )  # fmt: skip
    return paths


def test_bins_are_those_that_were_written():
    assert looks.LOW == histogram.LOW
    assert looks.A_DECADE == histogram.A_DECADE
    assert len(histogram.EDGES_E) - 1 == looks.BINS


def test_percentiles_are_read_by_layer_and_unit(runs):
    found = read_percentiles(runs[1])
    assert list(found) == [("hidden.norm", False), ("hidden.norm", True)]
    unit, table = found["hidden.norm", False]
    assert unit == "7"
    assert table.tolist() == [[10, -2, 0, 20], [20, -2, 0, 40], [30, -2, 0, 60]]


def test_of_gradients_the_newest_whole_look_is_read_with_both_signs_together(runs):
    found = read_gradients(runs[0])
    assert (found["hidden.linear"].step, found["hidden.linear"].kurtosis) == (20, 4.5)
    share_B = found["hidden.linear"].share_B
    assert share_B.sum() == 1
    powers = looks.LOW + np.flatnonzero(share_B) / looks.A_DECADE
    assert powers.tolist() == [-4.25, -2.25]  # lower edges
    assert share_B[share_B > 0].tolist() == [0.5, 0.5]


def test_damaged_lines_are_left_out_and_the_rest_is_drawn(runs):
    with (runs[0] / "gradients.csv").open("a") as file:
        file.write("\n40,classifier,4,0.1,3,5,1 2 3\n40,classifier,4,0.1,3,5,x\n\0,,\n50,classifier\n")
    with (runs[0] / "percentiles.csv").open("a") as file:
        file.write("\n50,hidden.norm,7,a,b,c\n")
    assert read_gradients(runs[0])["classifier"].step == 20
    assert len(read_percentiles(runs[0])["hidden.norm", False][1]) == 3
    (_, percentiles), (_, histograms) = looks.looks([read_run(path) for path in runs])
    assert len(percentiles) == len(histograms) == 2


def test_a_chart_a_layer_shows_both_runs(runs):
    (_, percentiles), (_, histograms) = looks.looks([read_run(path) for path in runs])
    assert [chart.title for chart in percentiles] == ["hidden.norm, unit 7", "hidden.norm, all units"]
    assert [line.colour for line in percentiles[0].lines] == [0, 0, 0, 1, 1, 1]
    assert [chart.title for chart in histograms] == ["hidden.linear", "classifier"]
    assert "bare at step 20: deviation 0.25, kurtosis 4.5" in histograms[0].note
    assert "kurtosis none" in histograms[1].note
    for line in histograms[0].lines:
        peaks = line.x[line.y == line.y.max()]
        assert np.abs(peaks - [-4.1, -2.1]).max() < 0.13


def test_a_network_of_many_layers_is_drawn_from_the_first_to_the_last(tmp_path):
    path = simple(tmp_path / "run")
    rows = "".join(f"10,layer{i},4,0.1,3,5,{counts(-3.1)}\n" for i in range(70))
    (path / "gradients.csv").write_text(",".join(gradients.COLUMNS) + "\n" + rows)
    ((_, none), (_, charts)) = looks.looks([read_run(path)])
    assert none == []
    assert len(charts) == looks.GRADIENTS
    assert (charts[0].title, charts[-1].title) == ("layer0", "layer69")


def test_the_page_has_the_charts_and_a_report_without_looks_has_none(runs, tmp_path):
    page = make_report(runs, tmp_path / "report").read_text()
    assert "Inputs of nonlinearities" in page
    assert "Gradients by layer" in page
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert {"looks.png", "percentiles-1.png", "percentiles-2.png", "gradients-1.png", "gradients-2.png"} <= pictures
    page = make_report([simple(tmp_path / "plain")], tmp_path / "report").read_text()
    assert "Gradients by layer" not in page
    assert not {path.name for path in (tmp_path / "report").glob("*.png")} & {"looks.png", "percentiles-1.png"}
