"""The mean of states is that of their values in float64, and of one network alone."""

import pytest
import torch

from pipeline.training.soup import SoupError, mean_of


def state(seed: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(4, 3, generator=generator), "half": torch.randn(5, generator=generator).bfloat16(),
            "batches": torch.tensor(seed), **more}  # fmt: skip


def test_a_mean_is_taken_in_float64_and_rounded_once():
    states = [state(seed) for seed in range(3)]
    states[0]["weight"] += 1e6  # float32 sums would lose digits of the others
    found = mean_of((str(i), each) for i, each in enumerate(states))
    for key in ("weight", "half"):
        exact = torch.stack([each[key].double() for each in states]).mean(0)
        assert found[key].dtype == states[0][key].dtype
        assert torch.equal(found[key], exact.to(found[key].dtype))
    assert found["batches"] == 0  # of the first: a count has no mean
    assert torch.equal(states[1]["weight"], state(1)["weight"])  # members stay as they are


def test_the_mean_of_one_is_itself():
    assert all(torch.equal(value, state(3)[key]) for key, value in mean_of([("a", state(3))]).items())


def test_states_of_other_networks_are_refused():
    def refused(other: dict[str, torch.Tensor]) -> str:
        with pytest.raises(SoupError) as caught:
            mean_of([("a", state(0)), ("b", other)])
        return str(caught.value)

    assert "b is of another network than a: 1 tensors are in one of them alone, more the first" in refused(
        state(1, more=torch.zeros(1))
    )
    assert "weight is (2, 3) in it, and (4, 3) in the other" in refused(state(1, weight=torch.zeros(2, 3)))
    assert "b: weight holds values that are no numbers; leave it out" in refused(
        state(1, weight=torch.full((4, 3), torch.nan))
    )
    with pytest.raises(SoupError, match="nothing to average"):
        mean_of([])
