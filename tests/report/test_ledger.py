import json

from pipeline.report.ledger import Epoch, read_ledger


def write(directory, rank: int, lines: list[tuple[int, int, list[str]]], end: str = "") -> None:
    directory.mkdir(exist_ok=True)
    text = "".join(json.dumps({"epoch": e, "step": s, "keys": keys}) + "\n" for e, s, keys in lines)
    (directory / f"rank-{rank}.jsonl").write_text(text + end)


def test_epochs_are_counted_over_ranks_that_come_and_go(tmp_path):
    write(tmp_path, 0, [(0, 1, ["a", "b"]), (0, 2, ["e", "f", "g", "h"]), (1, 3, ["b", "a"])])
    write(tmp_path, 1, [(0, 1, ["c", "d"])])  # the second start has one rank alone
    assert read_ledger(tmp_path) == [Epoch(0, 2, 8, 0), Epoch(1, 1, 2, 0)]


def test_a_sample_that_stands_twice_in_an_epoch_is_found_across_ranks_and_steps(tmp_path):
    write(tmp_path, 0, [(0, 1, ["a", "b"]), (1, 2, ["a", "c"])])
    write(tmp_path, 1, [(0, 1, ["c", "a"]), (1, 2, ["d", "b"])])
    assert read_ledger(tmp_path) == [Epoch(0, 1, 4, 1), Epoch(1, 1, 4, 0)]


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    write(tmp_path, 0, [(0, 1, ["a"])], end='{"epoch": 0, "step": 2, "keys": ["b"]}')
    write(tmp_path, 1, [(0, 1, ["c"])], end='{"epoch": 0, "st')
    write(tmp_path, 2, [], end="no json\n[1]\n")
    assert read_ledger(tmp_path) == [Epoch(0, 1, 2, 0)]


def test_progress_ends_with_every_byte(tmp_path):
    write(tmp_path, 0, [(0, 1, ["a"]), (1, 2, ["a"])])
    seen = []
    read_ledger(tmp_path, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == (tmp_path / "rank-0.jsonl").stat().st_size
