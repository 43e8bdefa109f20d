"""A page says which rank held the run up, and what each node did; of hand-made files."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.callbacks.samples import DIRECTORY
from pipeline.callbacks.stragglers import COLUMNS, MOST, Seat, Stragglers, Times
from pipeline.report.figures import figures
from pipeline.report.machines import read_nodes
from pipeline.report.making import make_report
from pipeline.report.ranks import read_ranks
from pipeline.report.record import read_run
from tests.report.runs import BEGAN, make_run, simple, start, train

Part = tuple[int, list[float], str]  # looks, seconds that each rank takes over a step itself, host


def with_ranks(directory: Path, *parts: Part) -> Path:
    """A run with a row each 10 steps, as its own callback would have written them. Two ranks a node."""
    path, rows, step = directory.parent / "ranks.csv", [], 0
    path.unlink(missing_ok=True)
    for looks, own_R, host in parts:
        stragglers = Stragglers(path, say=lambda text: None)
        stragglers.seats = [Seat(rank // 2, f"{host}{rank // 2}") for rank in range(len(own_R))]
        stragglers.begin(step)
        for _ in range(looks):
            step += 10
            named = stragglers.add(step, 10, [Times(10 * own, 0.0) for own in own_R])
            rows.append(train(step, step, seconds=step, **named))
    make_run(directory, rows, [start(0, until=step)])
    path.rename(directory / "ranks.csv")
    return directory


def with_nodes(run: Path, nodes: int, *, gpus: int = 0) -> Path:
    (run / DIRECTORY).mkdir()
    names = [f"gpu{gpu}_{name}" for gpu in range(gpus) for name in ("use", "celsius", "watts")]
    for node in range(nodes):
        of_gpus = [f"{value}" for gpu in range(gpus) for value in (0.5 + gpu / 4, 60 + gpu, 300)]
        lines = [",".join([f"{BEGAN + 15 * i}", f"h{node}", f"{0.05 * node + 0.25}", "", *of_gpus]) for i in range(8)]
        text = "\n".join([",".join(["at", "host", "cpu", "load", *names]), *lines])
        (run / DIRECTORY / f"node-{node}.csv").write_text(f"{text}\n")
    return run


def chart(run: Path, key: str):
    found = [each for _, charts in figures([read_run(run)], np.nan) for each in charts if each.key == key]
    return found[0] if found else None


def sentences(run: Path) -> list[str]:
    found = read_run(run)
    return found.ranks.sentences(found.train)


def test_the_page_names_the_slow_rank_with_its_node_and_how_much_it_took(tmp_path):
    run = with_nodes(with_ranks(tmp_path / "a", (40, [0.1, 0.1, 0.1, 0.121], "a")), 2)
    text = make_report([run]).read_text()
    said = "rank 3 (node 1, a1) took 1.21 times the median&#x27;s own time in steps, from step 10 to 400; all others"
    assert said in text
    assert text.count('class="warn"') == 1
    strip = chart(run, "ranks-own")
    assert strip.names == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert {round(value, 2) for *_, value in strip.cells[3]} == {0.21}
    assert [strip.cells[0][0][0], strip.cells[0][-1][1]] == [0, 400]
    cpu = chart(run, "cpu")
    assert [(line.name, line.y[0]) for line in cpu.lines] == [("node 0", 0.25), ("node 1", 0.3)]
    assert cpu.lines[0].x[-1] == 7 * 15
    assert chart(run, "gpu") is chart(run, "memory") is None  # of which nothing is known
    assert chart(run, "ranks-data") is None  # nobody waits
    for name in ("ranks-own", "cpu"):
        assert (run / "report" / f"{name}.png").stat().st_size > 500


def test_figures_of_a_nodes_gpus_are_taken_together(tmp_path):
    run = with_nodes(simple(tmp_path / "a"), 1, gpus=2)
    (node,) = read_nodes(run)
    assert node.values["gpu1_use"][0] == 0.75
    assert [chart(run, key).lines[0].y[-1] for key in ("gpu", "gpu-celsius", "gpu-watts")] == [0.625, 61, 600]


def test_who_was_slow_on_one_machine_is_not_so_on_another(tmp_path):
    slow, even, fewer = (30, [0.1, 0.13, 0.1], "a"), (30, [0.1, 0.1, 0.1], "b"), (25, [0.1, 0.1], "c")
    run = with_ranks(tmp_path / "a", slow, even, fewer)
    assert sentences(run) == [
        "rank 1 (node 0, a0) took 1.30 times the median's own time in steps, from step 10 to 300; all others waited "
        "for it."
    ]
    strip = chart(run, "ranks-own")
    assert len(strip.cells[0]) > len(strip.cells[2])


def test_who_becomes_slow_is_named_from_the_looks_that_named_it(tmp_path):
    run = with_ranks(tmp_path / "a", (50, [0.1, 0.1], "a"))
    assert sentences(run) == []
    later = with_ranks(tmp_path / "b", (50, [0.1, 0.1], "a"), (MOST, [0.1, 0.15], "a"))
    (said,) = sentences(later)
    assert said.startswith("rank 1 (node 0, a0) took 1.50 times the median's own time in steps, from step 490 to 680")


def test_a_rank_that_was_slow_twice_is_named_twice_and_not_in_between(tmp_path):
    fast, slow = [0.1, 0.1], [0.1, 0.13]
    run = with_ranks(tmp_path / "a", (30, slow, "a"), (200, fast, "a"), (30, slow, "a"))
    first, second = sentences(run)
    assert "took 1.30 times the median's own time in steps, from step 10 to " in first
    assert "took 1.30 times the median's own time in steps, from step 2," in second


def test_many_ranks_share_rows_and_many_nodes_are_a_range(tmp_path):
    run = with_nodes(with_ranks(tmp_path / "a", (300, [0.1] * 99 + [0.15], "a")), 12)
    strip = chart(run, "ranks-own")
    assert len(strip.names) <= 32
    assert strip.names[0] == "0 to 3"
    assert max(map(len, strip.cells)) <= 64
    assert min(value for *_, value in strip.cells[-1]) == pytest.approx(0.5)
    (line,) = chart(run, "cpu").lines
    assert (line.low[0], line.high[0]) == (0.25, pytest.approx(0.8))
    assert make_report([run]).stat().st_size < 400_000


@pytest.mark.parametrize("content", ["", "step,rank\n1,2\n", ",".join(COLUMNS) + "\n100,0,0,a,1", "\x00\xff", None])
def test_a_run_without_sound_looks_has_no_strip_and_no_sentence(tmp_path, content):
    run = simple(tmp_path / "a")
    if content is not None:
        (run / "ranks.csv").write_text(content)
    assert sentences(run) == []
    assert chart(run, "ranks-own") is None
    assert 'class="warn"' not in make_report([run]).read_text()


def test_a_look_that_is_being_written_is_left_out(tmp_path):
    run = with_ranks(tmp_path / "a", (20, [0.1, 0.13, 0.1], "a"))
    text = (run / "ranks.csv").read_text()
    (run / "ranks.csv").write_text(text + "210,0,0,a0,0.1,0\n210,1,0,a0,0.1,0\n210,2,0,a")
    (stretch,) = read_ranks(run / "ranks.csv").stretches
    assert len(stretch.steps) == 20


def test_of_several_runs_each_has_the_middle_of_its_nodes(tmp_path):
    runs = [with_nodes(with_ranks(tmp_path / name, (20, [0.1, 0.13], name)), 3) for name in "ab"]
    sections = dict(figures([read_run(run) for run in runs], np.nan))
    (cpu,) = sections["Ranks and nodes"]
    assert [(line.name, round(line.y[0], 9)) for line in cpu.lines] == [("a", 0.3), ("b", 0.3)]
    assert '<p class="warn">b: rank 1 (node 0, b0) took 1.30 times' in make_report(runs).read_text()


def test_a_rank_that_waits_for_data_is_named_and_has_a_strip(tmp_path):
    run = with_ranks(tmp_path / "a", (20, [0.1, 0.1], "a"))
    lines = (run / "ranks.csv").read_text().splitlines()
    (run / "ranks.csv").write_text(
        "\n".join([lines[0], *(f"{line[:-1]}{0.04 * (',1,' in line[:6])}" for line in lines[1:])]) + "\n"
    )
    header, *rows = (line.split(",") for line in (run / "metrics.csv").read_text().splitlines())
    for row in rows:
        row[header.index("slowest_data_rank")] = "1.0"
    (run / "metrics.csv").write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")
    assert sentences(run) == [
        "rank 1 (node 0, a0) waited for data, by 33% of a step more than the median, from step 10 to 200; all others "
        "waited for it."
    ]
    assert chart(run, "ranks-data").cells[1][0][2] == pytest.approx(0.04 / 0.12)
