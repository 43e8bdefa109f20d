import pytest

from pipeline.data.dataset import Location
from pipeline.data.preparation import ready_data
from pipeline.data.shards import DataError


def test_a_source_is_packed_once_and_leaves_nothing_beside(tmp_path):
    said = []
    root = tmp_path / "shards" / "digits"
    first = ready_data(Location(str(root)), source="digits", say=said.append)
    assert ready_data(Location(str(root)), source="digits", say=said.append) == first
    assert said == [f"packing digits into {root}"]
    assert [path.name for path in root.parent.iterdir()] == ["digits"]


def test_of_two_runs_that_pack_at_once_one_brings_its_directory_in(tmp_path, monkeypatch):
    from pipeline.data import writer

    root = tmp_path / "digits"
    original = writer.write_shards

    def overtaken(source, place, **options):
        manifest = original(source, place, **options)
        if not root.exists():
            original(source, root)  # the other run was faster
        return manifest

    monkeypatch.setattr(writer, "write_shards", overtaken)
    assert ready_data(Location(str(root)), source="digits").manifest.count("train") == 1437
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_shard_that_is_gone_is_named(shards, tmp_path):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(shards, root)
    (root / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"lacks train-000002\.tar; bring the shards back, or write them again"):
        ready_data(Location(str(root)))
