import numpy as np

from pipeline.data.dataset import Location, open_dataset
from pipeline.data.description import contact_sheet, describe


def test_facts_of_every_split(shards):
    train = describe(open_dataset(Location(str(shards))))["train"]
    assert (train.samples, train.shards, train.class_fewest, train.class_most) == (130, 5, 26, 26)
    assert train.width == (20, 21, 22)
    assert train.height == (18, 18, 18)
    assert 0.9 < train.mixing < 1.1  # as well mixed as a draw from all
    assert train.bytes_total == round(train.bytes_mean * 130)


def test_the_contact_sheet_shows_images_of_every_class(shards):
    sheet = np.asarray(contact_sheet(open_dataset(Location(str(shards))), "val", columns=5, rows=2, cell=40))
    assert sheet.shape == (2 * 54, 5 * 40, 3)
    cells = [sheet[y : y + 40, x : x + 40] for y in (0, 54) for x in range(0, 200, 40)]
    assert all(cell.std() > 10 for cell in cells)  # each holds a picture
