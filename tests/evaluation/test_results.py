import numpy as np
import pytest

from pipeline.evaluation.predictions import Predictions, PredictionsError
from pipeline.evaluation.results import SETTINGS, Buffer, Results

SETTINGS_HERE = {"checkpoint": "ab", "views": 10}


def part(*samples: int) -> Predictions:
    probability = np.random.default_rng(samples[0]).dirichlet(np.ones(3), len(samples)).astype(np.float32)
    return Predictions(np.array(samples), [f"k{s}" for s in samples], np.array(samples) % 3, probability,
                       np.array(samples) / 7)  # fmt: skip


def fault(sample: int) -> dict[str, object]:
    return {"sample": sample, "key": f"k{sample}", "reason": "torn"}


def test_blocks_of_any_ranks_and_starts_are_put_together(tmp_path):
    Results(tmp_path, SETTINGS_HERE, 7).add({2: 2}, part(4, 5), [])
    later = Results(tmp_path, SETTINGS_HERE, 7)
    assert set(later.blocks()) == {2}
    later.add({0: 2, 3: 1}, part(0, 6), [fault(1)])
    later.add({1: 2}, part(2, 3), [])
    assert (set(later.blocks()), later.count()) == ({0, 1, 2, 3}, 7)
    predictions, faults = later.put_together()
    assert predictions.sample_N.tolist() == [0, 2, 3, 4, 5, 6]
    assert faults == [fault(1)]
    assert later.predictions is None
    later.finish(predictions)
    assert set(later.blocks()) == {0, 1, 2, 3}  # a kill before the scores are written finds them
    later.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.npz", SETTINGS]
    assert np.array_equal(later.predictions.probability_NK, predictions.probability_NK)


def test_a_block_that_two_ranks_did_counts_once(tmp_path):
    results = Results(tmp_path, SETTINGS_HERE, 4)
    results.add({0: 2}, part(0, 1), [])
    results.add({0: 2, 1: 2}, Predictions.merged([part(0, 1), part(2, 3)]), [])
    assert results.put_together()[0].sample_N.tolist() == [0, 1, 2, 3]


def test_what_is_missing_is_counted(tmp_path):
    results = Results(tmp_path, SETTINGS_HERE, 5)
    results.add({0: 2}, part(0, 1), [])
    with pytest.raises(PredictionsError, match="lacks 3 of 5 images"):
        results.put_together()


def test_a_directory_of_another_evaluation_is_refused_with_the_difference(tmp_path):
    Results(tmp_path, SETTINGS_HERE, 5)
    with pytest.raises(PredictionsError, match=r"another evaluation \(views = 10, here 144\)"):
        Results(tmp_path, {**SETTINGS_HERE, "views": 144}, 5)
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(PredictionsError, match="is damaged"):
        Results(tmp_path, SETTINGS_HERE, 5)


def test_a_part_of_another_evaluation_is_refused_by_name(tmp_path):
    there = Results(tmp_path / "there", {**SETTINGS_HERE, "views": 1}, 2)
    there.add({0: 2}, part(0, 1), [])
    here = Results(tmp_path / "here", SETTINGS_HERE, 2)
    (there.directory / "part-00000000-2.npz").rename(here.directory / "part-00000000-2.npz")
    for use in (here.blocks, here.put_together):
        with pytest.raises(PredictionsError, match=r"part-00000000-2\.npz belongs to another evaluation"):
            use()


def test_statistics_are_kept_for_later_starts(tmp_path):
    results = Results(tmp_path, SETTINGS_HERE, 5)
    assert results.statistics() is None
    values = np.array([0.1, 1e-300, -3])
    results.save_statistics(values)
    assert np.array_equal(Results(tmp_path, SETTINGS_HERE, 5).statistics(), values)


def test_a_buffer_writes_each_block_once_and_an_interrupted_write_again(tmp_path, monkeypatch):
    results = Results(tmp_path, SETTINGS_HERE, 6)
    buffer = Buffer(results)
    buffer.add(4, part(0), [fault(1)])
    buffer.add(5, part(2, 3), [])
    assert (buffer.images, results.count()) == (4, 0)  # not yet old enough

    def interrupted(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        buffer.flush()
    buffer.flush()
    buffer.flush()
    assert (buffer.images, results.count(), set(results.blocks())) == (0, 4, {4, 5})
    assert len(list(tmp_path.glob("part-*"))) == 1
