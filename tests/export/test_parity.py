import pytest
import torch

from pipeline.export.description import ExportError
from pipeline.export.parity import check, compared
from pipeline.export.speed import measured

LOGITS = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 2.0]])


def parity(exported, trained=LOGITS, exact=LOGITS):
    return compared(exact, trained, exported)


def test_equal_logits_agree_whatever_is_added_to_all_of_an_image():
    found = parity(LOGITS + torch.tensor([[100.0], [-3.0]]))
    assert found.images == 2
    assert found.difference < 1e-6
    assert found.swapped == 0
    check(found, "it")


def test_a_difference_beyond_the_tolerance_and_nan_are_refused():
    for other in (LOGITS + torch.tensor([1e-3, 0, 0]), LOGITS * float("nan")):
        with pytest.raises(ExportError, match="it is not kept"):
            check(parity(other), "it")


def test_a_network_that_rounds_much_by_itself_may_differ_by_four_times_that_and_by_no_more_than_a_thousandth():
    shift = torch.tensor([3e-4, 0, 0])
    own = float((LOGITS.softmax(1) - (LOGITS + shift).softmax(1)).abs().max())
    assert parity(LOGITS, trained=LOGITS + shift).tolerance == pytest.approx(4 * own, rel=1e-2)
    check(parity(LOGITS + 3 * shift, trained=LOGITS + shift), "it")
    with pytest.raises(ExportError, match="it is not kept"):
        check(parity(LOGITS + 5 * shift, trained=LOGITS + shift), "it")
    assert parity(LOGITS, trained=LOGITS.flip(1)).tolerance == 1e-3


def test_a_tie_may_go_either_way_and_another_first_class_may_not():
    tie = torch.tensor([[1.0, 1.0 + 1e-7]])
    assert compared(tie, tie, tie.flip(1)).swapped == 0
    assert parity(LOGITS.flip(1)).swapped == 2


def test_every_form_is_measured_at_every_batch_size_in_turn(monkeypatch):
    monkeypatch.setattr("pipeline.export.speed.SECONDS", 0.0)
    seen = []

    def form(name):
        return lambda images: seen.append((name, len(images)))

    rows = measured({"a": form("a"), "b": form("b")}, torch.zeros(3, 3, 2, 2), batches=(1, 8), rounds=3)
    assert [(r.form, r.batch, r.rounds) for r in rows] == [("a", 1, 3), ("b", 1, 3), ("a", 8, 3), ("b", 8, 3)]
    assert all(0 < r.low <= r.median <= r.high for r in rows)
    assert [name for name, _ in seen] == [*"aabb", *"ababab"] * 2  # two to warm up, then in turn
    assert [size for _, size in seen] == [1] * 10 + [8] * 10
