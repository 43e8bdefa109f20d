from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.predictions import Predictions, PredictionsError


def predictions(samples: list[int], classes: int = 4, *, loss: bool = True) -> Predictions:
    random = np.random.default_rng(sum(samples))
    probability = random.dirichlet(np.ones(classes), len(samples)).astype(np.float32)
    label = random.integers(0, classes, len(samples))
    return Predictions(np.array(samples), [f"ä/{s}" for s in samples], label, probability,
                       random.random(len(samples)) if loss else None)  # fmt: skip


def same(left: Predictions, right: Predictions) -> bool:
    return left.key == right.key and all(
        np.array_equal(getattr(left, name), getattr(right, name))
        for name in ("sample_N", "label_N", "probability_NK", "loss_N")
    )


@pytest.mark.parametrize("loss", [True, False])
def test_a_file_gives_back_what_was_written(tmp_path, loss):
    saved = predictions([0, 3, 8], loss=loss)
    saved.save(tmp_path / "p.npz")
    assert same(Predictions.load(tmp_path / "p.npz"), saved)
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]  # nothing half-written beside it


def test_parts_in_any_order_make_up_the_whole():
    whole = predictions([0, 1, 4, 5, 9])
    parts = [whole.only(np.array(samples)) for samples in ([4], [0, 9], [1, 5])]
    assert same(Predictions.merged(parts), whole)


def test_an_image_in_two_parts_is_refused_by_its_number():
    with pytest.raises(PredictionsError, match="image 4 is in two parts"):
        Predictions.merged([predictions([1, 4]), predictions([4, 5])])


def test_of_equal_probabilities_the_lower_class_comes_first():
    even = np.full((3, 3), 1 / 3, dtype=np.float32)
    p = Predictions(np.arange(3), ["a", "b", "c"], np.arange(3), even)
    assert p.places().tolist() == [0, 1, 2]
    assert p.hits(1).tolist() == [True, False, False]
    assert p.hits(2).tolist() == [True, True, False]


def test_what_is_no_number_is_no_hit():
    probability = np.array([[np.nan, np.nan], [0.2, 0.8]], dtype=np.float32)
    p = Predictions(np.arange(2), ["a", "b"], np.array([0, 1]), probability)
    assert p.hits(1).tolist() == [False, True]


def test_places_equal_a_sort():
    p = predictions(list(range(50)), classes=7)
    order = np.argsort(-p.probability_NK, axis=1, kind="stable")
    assert p.places().tolist() == [list(row).index(label) for row, label in zip(order, p.label_N, strict=True)]


def test_without_losses_they_are_those_of_the_labels_probability():
    p = Predictions(np.arange(2), ["a", "b"], np.array([1, 0]), np.array([[0.75, 0.25], [0, 1]], dtype=np.float32))
    assert p.losses() == pytest.approx([np.log(4), 103.27892990])


def test_a_damaged_file_is_named(tmp_path):
    path: Path = tmp_path / "p.npz"
    predictions([0, 1]).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(PredictionsError, match=r"p\.npz is torn"):
        Predictions.load(path)
    np.savez(path, sample=np.array([1, 2]))
    with pytest.raises(PredictionsError, match=r"p\.npz holds no predictions"):
        Predictions.load(path)
    np.savez(path, allow_pickle=True, sample=np.array([{"a": 1}], dtype=object))
    with pytest.raises(PredictionsError, match="torn, damaged"):  # nothing is unpickled
        Predictions.load(path)


def test_columns_that_do_not_fit_are_refused():
    p = predictions([0, 1])
    with pytest.raises(PredictionsError, match="one row an image"):
        Predictions(p.sample_N, p.key[:1], p.label_N, p.probability_NK)
    with pytest.raises(PredictionsError, match="must rise"):
        Predictions(p.sample_N[::-1], p.key, p.label_N, p.probability_NK)
    with pytest.raises(PredictionsError, match="outside the 4 classes"):
        Predictions(p.sample_N, p.key, p.label_N + 4, p.probability_NK)
