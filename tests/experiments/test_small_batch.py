import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.experiments import small_batch
from pipeline.experiments.curve import Curve
from pipeline.experiments.images import TrainingImages
from pipeline.experiments.ranks import KINDS, PARTS, differences
from pipeline.report.chart import drawn


def measured(off: float = 1e-14, **top1: list[float | None]) -> dict[str, object]:
    """What a measurement gives; None for a training that diverged. Through JSON."""
    reached = {"32": [0.9, 0.92, 0.91], "16": [0.9, 0.91, 0.91], "8": [0.88, 0.9, 0.89], "4": [0.8, 0.83, 0.8],
               "2": [0.5, 0.56, 0.5]} | {name.removeprefix("of"): values for name, values in top1.items()}  # fmt: skip
    curves = {name: [Curve(np.array([99.0][: value is not None]), np.array([value][: value is not None], dtype=float),
                           value is None).measured() for value in values]
              for name, values in reached.items()}  # fmt: skip
    apart = {group: {kind: dict.fromkeys(PARTS, 0.0 if group == "1" else off) for kind in KINDS} for group in "841"}
    return json.loads(json.dumps({"curves": curves, "apart": apart, "full": False, "remarks": []}))


def test_ranks_with_two_images_equal_one_with_sixteen_in_float64():
    apart = differences(8, 2, (8, 4, 1))
    for group in (8, 4):
        assert max(apart[group]["layer"].values()) < 1e-14
        assert max(apart[group]["network"].values()) < 1e-12  # through 69 norms, seen 8e-14
    assert all(off == 0 for parts in apart[1].values() for off in parts.values())  # local: to the bit


def test_the_difference_between_ranks_and_one_process_is_seen():
    """Were statistics of two processes not shared, they would be far from those of all images."""
    from pipeline.experiments.ranks import passed

    alone = passed(4, slice(0, 2), group_size=1)
    together = passed(4, slice(0, 4), group_size=1)
    for kind in KINDS:
        assert np.abs(alone[f"{kind} {PARTS[0]}"] - together[f"{kind} {PARTS[0]}"][:2]).max() > 1e-2


def test_the_claim_holds_by_pairs_of_seeds():
    finding = small_batch.tell(measured())
    assert finding.holds is True
    # 40, 36 and 41 points: 39.0, and by Student's t of three values 4.303 x 2.646 / sqrt(3)
    row = list(finding.tables[0].rows[-1])
    assert row == ["2 on 16", "52.0 ± 8.6 %", "89.0 ± 2.5 %", "91.0 ± 2.5 %", "39.0 ± 6.6", "34.7 %", "3"]
    assert "39.0 ± 6.6 points" in finding.said


def test_groups_take_the_training_of_as_many_images():
    rows = [list(row) for row in small_batch.tell(measured()).tables[0].rows]
    assert [row[0] for row in rows] == ["32 on 1", "16 on 2", "8 on 4", "4 on 8", "2 on 16"]
    assert rows[3][2] == rows[1][1]  # 4 ranks with 4 images, and 16 on one
    assert rows[2][2] == rows[0][1]  # 4 ranks with 8, and all


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({"off": 1e-9}, False),  # synchronized statistics are not those of all images
        ({"of2": [0.95, 0.97, 0.96]}, False),  # local ones are better
        ({"of2": [0.8, 0.99, 0.85]}, None),
    ],
)
def test_a_claim_that_does_not_hold_is_said(change, holds):
    assert small_batch.tell(measured(**change)).holds is holds


def test_one_seed_decides_nothing():
    one = {f"of{images}": [0.9] for images in small_batch.ON_A_RANK}
    finding = small_batch.tell(measured(**one))
    assert finding.holds is None
    assert all(drawn(figure).marks for figure in finding.figures)


def test_trainings_that_diverge_count_as_nothing_and_are_named():
    finding = small_batch.tell(measured(of2=[None, None, None]))
    assert finding.holds is True
    assert any("3 trainings ended in a loss that is no number" in remark for remark in finding.remarks)
    assert all(drawn(figure).marks for figure in finding.figures)


def test_trainings_differ_in_the_images_that_share_statistics_alone():
    shown = TrainingImages("digits", ["data=digits"], 1437, [], 360, 10, Path("shards"))
    of = {images: small_batch.words(shown, images, 0, full=False) for images in small_batch.ON_A_RANK}
    differing = {word for words in of.values() for word in words} - set.intersection(*map(set, of.values()))
    assert differing == {f"data.micro_batch_size={images}" for images in (0, 16, 8, 4, 2)}
