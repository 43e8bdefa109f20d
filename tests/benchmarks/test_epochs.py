from pipeline import cli
from pipeline.benchmarks.epochs import epochs, memory, report
from pipeline.benchmarks.start import starts
from pipeline.data.dataset import Location, open_dataset


def test_an_epoch_counts_every_image_once(shards):
    dataset = open_dataset(Location(str(shards)))
    passes = list(epochs(dataset, workers=1, count=2, size=8, batch=10))
    assert [(p.epoch, p.images) for p in passes] == [(0, 165), (1, 165)]  # 13 batches of 10, and 35 to validate
    assert all(p.seconds > 0 and p.resident > 50 and p.worker_private > 1 for p in passes)
    assert report(passes).row_count == 2
    assert memory("self", "Rss") > memory("self", "Private_Dirty") > 0


def test_every_start_is_a_process_of_its_own_at_the_place_asked_for(shards):
    found = starts(str(shards), samples=[0, 105], workers=[0], repeats=1, size=8, batch=10)
    assert [s.sample for s in found] == [0, 100]
    assert all(0 < s.opened < s.seconds for s in found)


def test_the_verbs_print_their_tables(capsys, shards):
    assert cli.main(["bench", "epochs", str(shards), "--epochs", "2", "--workers", "0", "--size", "8",
                     "--batch", "10"]) == 0  # fmt: skip
    assert capsys.readouterr().out.count("165") == 2
