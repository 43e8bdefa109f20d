"""BN((aW)u): the same output, the same gradient below, 1/a of it for the weights."""

import pytest

from pipeline.experiments.scale_invariance import LAWS, SCALES, deviations, gradient_size, tell


@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "convolution"])
@pytest.mark.parametrize("a", SCALES)
def test_the_scale_of_the_weights_changes_nothing_but_their_own_gradient(a, convolution):
    for seed in range(5):
        off = deviations(a, seed=seed, convolution=convolution)
        assert len(off) == len(LAWS)
        assert max(off) < 1e-10


def test_the_gradient_of_the_weights_falls_as_their_scale_grows():
    for a in (0.001, 0.1, 30.0):
        assert gradient_size(a, 0.0, seed=1) == pytest.approx(1 / a, rel=1e-9)


def test_with_epsilon_small_weights_leave_the_law():
    assert gradient_size(0.001, 1e-3, seed=1) < 0.1 / 0.001
    assert gradient_size(30.0, 1e-3, seed=1) == pytest.approx(1 / 30, rel=0.01)


def trainings(**ends: dict[float, float]) -> list[dict]:
    """Three alike of each network and rate: top-1 at the end, negative for one that diverged at once."""
    return [
        {"network": network, "rate": rate, "seed": seed, "step": [] if end < 0 else [528.0],
         "top1": [] if end < 0 else [end], "diverged": end < 0}
        for network, by_rate in ends.items() for rate, end in by_rate.items() for seed in range(3)
    ]  # fmt: skip


def made(off: float = 1e-15, **ends: dict[float, float]) -> dict:
    return {
        "images": "digits",
        "remarks": [],
        "deviations": {"linear": {"10.0": [[off] * 4] * 3}},
        "scales": [0.1, 1.0, 10.0],
        "gradient_size": {"eps = 0": [[10.0, 1.0, 0.1]] * 3},
        "trainings": trainings(**ends),
    }


NORMED = {0.1: 0.98, 0.5: 0.96, 2.5: 0.1}


def test_the_claim_holds_where_five_times_the_edge_fails_without_norms_alone():
    assert tell(made(mlp={0.1: 0.96, 0.5: 0.1, 2.5: -1}, bn_mlp=NORMED)).holds is True
    assert tell(made(mlp={0.1: 0.96, 0.5: -1, 2.5: -1}, bn_mlp=NORMED)).holds is True
    assert tell(made(mlp={0.1: 0.96, 0.5: 0.1, 2.5: -1}, bn_mlp={0.1: 0.98, 0.5: 0.1, 2.5: 0.1})).holds is False


def test_it_is_open_where_the_edge_was_not_found():
    assert tell(made(mlp={0.1: 0.1, 0.5: 0.1, 2.5: -1}, bn_mlp=NORMED)).holds is None
    assert tell(made(mlp={0.1: 0.96, 0.5: 0.96, 2.5: 0.9}, bn_mlp=NORMED)).holds is None


def test_identities_that_are_off_decide_alone():
    assert tell(made(1e-8, mlp={0.1: 0.96, 0.5: 0.1, 2.5: -1}, bn_mlp=NORMED)).holds is False


def test_the_table_says_what_diverged():
    rates = tell(made(mlp={0.1: 0.96, 0.5: 0.1, 2.5: -1}, bn_mlp=NORMED)).tables[1]
    assert [row[1] for row in rates.rows] == ["96.0 ± 0.0 %", "10.0 ± 0.0 %", "diverges"]


def test_the_axes_say_rates_and_powers():
    ladder, sizes = tell(made(mlp={0.1: 0.96, 0.5: 0.1}, bn_mlp=NORMED)).figures
    assert [ladder.x_number(rung) for rung in (0, 0.5, 1, 2)] == ["0.1", "", "0.5", "2.5"]
    assert [sizes.x_number(power) for power in (-4, -2, 0, 2)] == ["1e-4", "0.01", "1", "100"]
