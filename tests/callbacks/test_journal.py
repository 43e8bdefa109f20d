import os
from pathlib import Path

from pipeline.callbacks.journal import COLUMNS, Journal, Row, read_journal


def row(step: int, loss: float = 0.1, **more: float) -> Row:
    return Row(step=step, epoch=step / 3, split="train", loss=loss, top1=0.5, top5=1.0, images=24, **more)


def test_rows_come_back_with_all_their_digits(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [row(1, 1 / 3, rate=0.1), row(2, 2e-17, images_per_s=3.5, data_wait=0.0, seconds=1.5)]
    journal = Journal(path, from_step=0)
    for each in rows:
        journal.append(each)
        assert read_journal(path)[-1] == each  # on disk at once
    journal.close()
    assert read_journal(path) == rows
    assert path.read_text().splitlines()[0].split(",") == COLUMNS


def test_going_on_cuts_the_steps_that_were_undone(tmp_path):
    path = tmp_path / "metrics.csv"
    first = Journal(path, from_step=0)
    for step in range(1, 6):
        first.append(row(step))
    first.close()
    second = Journal(path, from_step=3)
    second.append(row(4, 0.7))
    second.close()
    assert [(r.step, r.loss) for r in read_journal(path)] == [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.7)]


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    journal = Journal(path, from_step=0)
    journal.append(row(1))
    journal.close()
    path.write_text(path.read_text() + "2,0.5,trai")
    assert [r.step for r in read_journal(path)] == [1]
    Journal(path, from_step=9).close()
    assert [r.step for r in read_journal(path)] == [1]


def test_a_journal_of_an_older_version_goes_on_with_the_columns_of_today(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,split,loss,top1,top5,images,rate\n1,0.5,train,0.25,0.5,1.0,24,0.1\n")
    (old,) = read_journal(path)
    assert (old.step, old.rate, old.span, old.at) == (1, 0.1, None, None)
    journal = Journal(path, from_step=1)
    journal.append(row(2, span=3.0))
    journal.close()
    assert [r.span for r in read_journal(path)] == [None, 3.0]


def test_a_line_without_its_end_is_no_row_even_where_nothing_but_its_last_digits_are_missing(tmp_path):
    path = tmp_path / "metrics.csv"
    journal = Journal(path, from_step=0)
    journal.append(row(1, nodes=12))
    journal.close()
    path.write_text(path.read_text().rstrip()[:-1])
    assert read_journal(path) == []


def test_what_going_on_undoes_is_known(tmp_path):
    path = tmp_path / "metrics.csv"
    journal = Journal(path, from_step=0)
    for step in range(1, 6):
        journal.append(row(step, at=100.0 + step))
    journal.close()
    later = Journal(path, from_step=3)
    assert (later.undone.step, later.undone.at) == (5, 105.0)
    later.close()
    again = Journal(path, from_step=3)
    assert again.undone is None
    again.close()


def test_no_row_waits_for_the_end_of_the_run_to_be_closed(tmp_path):
    """A mounted bucket sends what is closed; a machine that is taken away closes nothing."""
    journal = Journal(tmp_path / "metrics.csv", from_step=0)
    journal.append(row(1))
    held = {os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()}
    assert str(tmp_path / "metrics.csv") not in held
