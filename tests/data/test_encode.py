import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.data.decode import DecodeError, decode, image_type
from pipeline.data.encode import Encoding, encode, encoding
from pipeline.data.shards import DataError
from pipeline.data.writer import write_shards
from tests.conftest import noise_image
from tests.data.test_writer import contents, read_with_webdataset

WANTED = Encoding(shorter_side=32, quality=90)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(64, 48, (43, 32)), (48, 64, (32, 43)), (33, 33, (32, 32)), (500, 40, (400, 32)), (33, 1000, (32, 970))],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_larger_image_becomes_a_jpeg_with_the_wanted_shorter_side_and_its_aspect(width, height, expected, kind):
    encoded, original = encode(noise_image(1, width, height, kind), WANTED)
    assert original == (width, height)
    assert image_type(encoded) == "jpg"
    assert decode(encoded).shape == (*expected[::-1], 3)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (32, 900), (31, 500), (5, 3)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_small_enough_keeps_its_bytes(width, height, kind):
    payload = noise_image(2, width, height, kind)
    encoded, original = encode(payload, WANTED)
    assert encoded is payload
    assert original == (width, height)


def test_the_picture_stays_the_same_to_the_eye():
    payload = noise_image(3, 480, 400)
    encoded, _ = encode(payload, Encoding(shorter_side=160, quality=90))
    reference = Image.fromarray(decode(payload)).resize((192, 160), Image.Resampling.LANCZOS)
    difference = decode(encoded).astype(int) - np.asarray(reference).astype(int)
    assert np.sqrt((difference**2).mean()) < 2  # of 255


def test_every_colour_mode_becomes_rgb_as_it_is_decoded_in_training():
    for kind, mode in (("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("WEBP", "RGBA")):
        payload = noise_image(4, 64, 64, kind, mode)
        encoded, _ = encode(payload, WANTED)
        assert simplejpeg.decode_jpeg_header(encoded)[2] == "YCbCr"
        reference = np.asarray(Image.fromarray(decode(payload)).resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(decode(encoded).astype(int) - reference).mean() < 6, (kind, mode)


def test_orientation_is_not_applied_and_no_metadata_is_carried_along():
    image = Image.open(io.BytesIO(noise_image(5, 64, 48)))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, comment=b"secret", icc_profile=b"profile")
    encoded, original = encode(buffer.getvalue(), WANTED)
    assert original == (64, 48)
    with Image.open(io.BytesIO(encoded)) as smaller:
        assert smaller.size == (43, 32)
        assert not smaller.getexif()
        assert set(smaller.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_bytes_repeat_and_quality_orders_their_number():
    payload = noise_image(6, 200, 150)
    low, high = (encode(payload, Encoding(64, quality))[0] for quality in (50, 95))
    assert len(low) < len(high)
    assert encode(payload, Encoding(64, 95))[0] == high


@pytest.mark.parametrize(
    "payload", [b"", b"\xff\xd8\xff\xe0 no image", b"\x89PNG\r\n\x1a\n", noise_image(7, 64, 64)[:300]]
)
def test_what_does_not_decode_is_a_decode_error(payload):
    with pytest.raises(DecodeError):
        encode(payload, WANTED)


def test_a_side_that_jpeg_cannot_hold_is_a_decode_error():
    buffer = io.BytesIO()
    Image.new("RGB", (80_000, 9)).save(buffer, "PNG")
    with pytest.raises(DecodeError, match="71111 x 8 pixels"):
        encode(buffer.getvalue(), Encoding(shorter_side=8, quality=90))


@pytest.mark.parametrize(
    ("shorter_side", "quality", "message"),
    [
        (None, 90, "--quality 90 is of no use without --shorter-side; give both, or neither"),
        (7, None, "--shorter-side 7 must be at least 8 pixels"),
        (0, None, "--shorter-side 0 must be at least 8"),
        (-288, 90, "--shorter-side -288 must"),
        (288, 0, "--quality 0 must lie between 1 and 100; 90 is usual"),
        (288, 101, "--quality 101 must lie"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    folders, tmp_path, shorter_side, quality, message
):
    with pytest.raises(DataError, match=message):
        write_shards(str(folders), tmp_path / "out", shorter_side=shorter_side, quality=quality)
    assert not (tmp_path / "out").exists()
    assert encoding(None, None) is None
    assert encoding(288, None) == Encoding(288, 90)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders of six images, of which those of class b are small."""
    for label, side in (("a", 64), ("b", 20)):
        folder = tmp_path / "photos" / "train" / label
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{number}.png").write_bytes(noise_image(number, side + number, side))
    return tmp_path / "photos"


def test_shards_note_how_each_image_was_re_encoded_and_from_what_size(photos, tmp_path):
    write_shards(str(photos), tmp_path / "out", shorter_side=32, quality=80)
    samples = {s["__key__"]: s for s in read_with_webdataset(tmp_path / "out" / "train-000000.tar")}
    larger, small = samples["train/a/2"], samples["train/b/1"]
    facts = json.loads(larger["json"])
    assert (facts["shorter_side"], facts["quality"], facts["original"]) == (32, 80, [66, 64])
    assert decode(larger["jpg"]).shape == (32, 33, 3)
    facts = json.loads(small["json"])
    assert small["png"] == (photos / "train" / "b" / "1.png").read_bytes()
    assert (facts["shorter_side"], facts["original"], "quality" in facts) == (32, [21, 20], False)


def test_re_encoded_shards_are_the_same_for_any_number_of_workers(photos, tmp_path):
    for workers in (1, 2):
        write_shards(str(photos), tmp_path / str(workers), samples_per_shard=2, workers=workers, shorter_side=32)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_another_setting_is_refused_where_shards_were_written_already(photos, tmp_path):
    out = tmp_path / "out"
    first = write_shards(str(photos), out, shorter_side=32)
    assert write_shards(str(photos), out, shorter_side=32, quality=90) == first  # the default, said aloud
    for other in ({}, {"shorter_side": 40}, {"shorter_side": 32, "quality": 80}):
        with pytest.raises(DataError, match="holds another data set; give an empty directory"):
            write_shards(str(photos), out, **other)
        (out / "dataset.json").rename(tmp_path / "aside")  # as if interrupted before its end
        with pytest.raises(DataError, match="was written from another source or with other settings; give an empty"):
            write_shards(str(photos), out, **other)
        (tmp_path / "aside").rename(out / "dataset.json")


def test_an_image_that_does_not_decode_is_named(photos, tmp_path):
    broken = photos / "train" / "a" / "1.png"
    broken.write_bytes(broken.read_bytes()[:400])
    with pytest.raises(DataError, match=r"train/a/1\.png cannot be decoded: .*; remove it from the source"):
        write_shards(str(photos), tmp_path / "out", shorter_side=32)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(photos.rglob("*.png")):
            archive.write(file, file.relative_to(photos))
    with pytest.raises(DataError, match=r"a\.zip:train/a/1\.png cannot be decoded"):
        write_shards(str(tmp_path / "a.zip"), tmp_path / "out", shorter_side=32)
    assert not list((tmp_path / "out").glob("*.tar"))
