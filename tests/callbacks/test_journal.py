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
