"""Input that contradicts itself or stands for more than its file can hold is refused."""

import contextlib
import gzip
import io
import json
import struct
import tarfile
import types
import zlib

import numpy as np
import odd_images
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from tar_files import tar_of

from vit_jax.data import crc32c, images, open_source, tfrecord
from vit_jax.data.host_tensorflow import tf
from vit_jax.data.prepare import imagenet_tars
from vit_jax.data.sources import _coco_json, _labels, _splits, _tar_index, npz
from vit_jax.errors import UserError


def png(value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def refuses(match, source, name, **args):
    with pytest.raises(UserError, match=match) as raised:
        open_source({"source": source, "name": str(name), **args})
    assert "\n" not in str(raised.value)


def write(path, content):
    path.write_text(content)
    return path


def test_a_key_that_comes_twice_in_json_loses_nothing_in_silence(tmp_path):
    captions = write(tmp_path / "c.jsonl", '{"image": "a.png", "caption": "x", "caption": "y"}')
    refuses("line 1 .*key 'caption' twice", "captions", captions, images=str(tmp_path))
    table = write(tmp_path / "t.jsonl", '{"image": "a.png", "label": "x", "label": "y"}')
    refuses("line 1 .*key 'label' twice", "table", table)
    coco = write(tmp_path / "c.json", '{"images": [], "images": [], "annotations": []}')
    refuses("key 'images' twice", "coco", coco, images=str(tmp_path))


@pytest.mark.parametrize(
    "rows", ['i1,"a wide tv\ni2,a dog\ni3,tv of 5"\ni4,x', 'i1,"a\ni2,b"\ni4,x']
)
def test_a_quote_mark_left_open_swallows_no_files_without_suffix(tmp_path, rows):
    for name in ("i1", "i2", "i3", "i4"):
        (tmp_path / name).write_bytes(png())
    captions = write(tmp_path / "c.csv", f"image,caption\n{rows}\n")
    refuses("line 2 .*quote mark is left open", "captions", captions, images=str(tmp_path))
    table = write(tmp_path / "t.csv", f"image,label\n{rows}\n")
    refuses("line 2 .*quote mark is left open", "table", table)
    refuses("label of several lines", "table", table, images=str(tmp_path.parent))


def test_a_caption_of_several_lines_with_commas_is_none_of_the_files(tmp_path):
    (tmp_path / "a").write_bytes(png())
    captions = write(tmp_path / "c.csv", 'image,caption\na,"a dog\nblack, and wet"\n')
    source = open_source({"source": "captions", "name": str(captions), "images": str(tmp_path)})
    assert source._captions[0, 0] == b"a dog\nblack, and wet"


def test_a_row_that_is_cut_short_is_no_negative_label(tmp_path):
    columns = write(tmp_path / "m.csv", "image,cat,dog\na.png,1,1\nb.png,1\n")
    refuses("line 3 has no 'dog', because it has 2 cells", "table", columns, label=["cat", "dog"])
    cell = write(tmp_path / "s.csv", "image,label\na.png,x|y\nb.png\n")
    refuses("line 3 has no 'label'", "table", cell, separator="|")
    rows = write(tmp_path / "s.jsonl", '{"image": "a.png", "label": ["x"]}\n{"image": "b.png"}')
    refuses("line 2 has no 'label'", "table", rows)


def test_classes_of_masks_are_named_as_those_of_tables(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(png())
    for names, match in ("road\n\ncar\n", "an empty name"), ("road\n road\n", "two classes 'road'"):
        file = str(write(tmp_path / "names.txt", names))
        refuses(match, "segmentation_folder", tmp_path, class_names=file)


def test_ids_and_labels_may_have_thousands_of_digits(tmp_path):
    long = "1" * 5000
    with pytest.raises(UserError, match=r"which is not listed$"):
        _coco_json.check_listed(tmp_path, 0, "image", long, {1: None})
    assert _labels.sorted_names([(long,), ("10",), ("9",), ("09",)]) == ("09", "9", "10", long)


def tar(path, members):
    path.write_bytes(tar_of(members))
    return path


def test_a_sample_that_comes_twice_gets_no_label_of_another(tmp_path):
    one, two = [("k.png", png(0)), ("k.cls", b"1")], [("k.png", png(9)), ("k.cls", b"2")]
    refuses("two members are called 'k.png'", "webdataset", tar(tmp_path / "a.tar", one + two))
    between = [("l.png", png()), ("l.cls", b"1")]
    refuses(
        "two samples are called 'k'", "webdataset", tar(tmp_path / "b.tar", one + between + two)
    )


def header(kind, size, name="x"):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def sparse(**fields):
    records = b""
    for key, value in fields.items():
        body = f" GNU.sparse.{key}={value}\n"
        length = len(body) + 2 + (len(body) + 2 > 99)
        records += f"{length}{body}".encode()
    padded = records + bytes(-len(records) % 512)
    return header(b"x", len(records)) + padded + header(b"0", 512) + b"zz\n" + bytes(509 + 1024)


DAMAGED_TARS = {
    "names after names": (header(b"L", 2) + b"a\0" + bytes(510)) * 3000 + header(b"0", 0),
    "map without numbers": sparse(major=1, minor=0, name="a.png", realsize=10),
    "map of text": sparse(map="1,x", size=3),
    "size of text": sparse(realsize="abc", major=1, minor=0),
}


@pytest.mark.parametrize("damage", DAMAGED_TARS)
def test_damaged_headers_of_tars_are_named(tmp_path, damage):
    path = tmp_path / "a.tar"
    path.write_bytes(DAMAGED_TARS[damage])
    refuses(r"a\.tar: no tar file, or a damaged one", "webdataset", path)
    with pytest.raises(UserError, match=r"a\.tar (is damaged or incomplete|holds)"):
        imagenet_tars.read_index("validation", path)


def test_an_index_far_larger_than_its_file_is_made_anew(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", [("k.png", png()), ("k.cls", b"1")])
    index = f"{path}{_tar_index.SUFFIX}"
    monkeypatch.setattr(npz, "ALWAYS_UNPACKED", 1000)
    np.savez_compressed(index, stamp=np.zeros(1 << 20, np.int8))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("the index was unpacked"))
    assert len(_tar_index.of(str(path)).key) == 1


def test_rows_and_values_that_no_such_file_can_hold_are_refused(tmp_path):
    count = 1_200_000
    path = tmp_path / "a.parquet"
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), ["a.png"])
    parquet.write_table(pa.table({"image": names, "label": np.zeros(count, np.int8)}), path)
    refuses("bytes that stand for 1,200,000 rows", "table", path)
    for split, what, shape in (("images", 3, (1 << 20, 28, 28)), ("labels", 1, (1 << 20,))):
        start = bytes([0, 0, 8, what]) + struct.pack(f">{what}I", *shape)
        with gzip.open(tmp_path / f"train-{split}-idx{what}-ubyte.gz", "wb") as file:
            file.write(start)
    refuses("more than the 268,435,456 that are read", "idx", tmp_path)


@pytest.mark.parametrize("split", ["train[:{}]", "train[{}%:]", "train[fold 1 of {}]"])
def test_numbers_of_a_split_may_have_thousands_of_digits(split):
    for digits in ("9" * 5000, "9" * 400, "9" * 9):
        with contextlib.suppress(UserError):  # A part may end beyond the last example.
            groups = np.arange(4) if "fold" in split else None
            _splits.select(split.format(digits), np.arange(4), groups)


def test_a_flipped_byte_in_a_page_of_parquet_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"image": ["a.png"], "label": ["xaqz"]})
    parquet.write_table(
        table, path, write_page_checksum=True, use_dictionary=False, write_statistics=False
    )
    data = path.read_bytes()
    assert data.count(b"xaqz") == 1
    path.write_bytes(data.replace(b"xaqz", b"xbqz"))
    refuses("a.parquet: .*checksum", "table", path)


def test_rows_of_classes_of_one_name_stay_apart():
    from vit_jax.training import class_rows

    assert class_rows.rows_by_name(["crane", "kite", "crane"], ["kite", "crane", "crane"]) == [
        1, 0, 2,
    ]  # fmt: skip
    assert class_rows.rows_by_name(["a", "b"], ["a", "a", "c"]) == [0, None, None]


@pytest.mark.parametrize("remote", [False, True])
def test_a_flipped_bit_in_a_record_is_found_when_it_is_first_read(tmp_path, remote):
    path, contents = tmp_path / "x.tfrecord", [b"a" * 7, bytes(range(256)) * 3, b"", b"abc"]
    with tf.io.TFRecordWriter(str(path)) as writer:
        for content in contents:
            writer.write(content)
    shard = types.SimpleNamespace(filename=str(path), skip=0, take=4, examples_in_shard=4)
    whole = tfrecord.TfrecordReader([shard], lambda data: data, remote=remote)
    assert whole.__getitems__([0, 1, 2, 3]) == contents
    data = bytearray(path.read_bytes())
    data[200] ^= 4
    path.write_bytes(data)
    damaged = tfrecord.TfrecordReader([shard], lambda data: data, remote=remote)
    assert damaged.__getitems__([0, 2, 3]) == [contents[0], *contents[2:]]
    with pytest.raises(OSError, match=r"record 1 of .*x\.tfrecord does not have its checksum"):
        damaged.__getitems__([1])


def test_crc32c_has_the_values_of_its_standard():
    """RFC 3720, appendix B.4, and the check value of the catalogs."""
    assert crc32c.crc32c(b"123456789") == 0xE3069283
    assert crc32c.crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("chunk", [b"IDAT", b"PLTE"])
def test_a_flipped_bit_in_a_png_is_found_by_both_readers(chunk):
    picture = Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12)).convert("P")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[data.index(chunk) + 8] ^= 1
    with pytest.raises(OSError, match=rf"damaged PNG: .*{chunk.decode()}.* checksum"):
        images.pixels(bytes(data))
    with pytest.raises(tf.errors.InvalidArgumentError):
        tf.io.decode_image(bytes(data))


def test_exif_behind_the_pixels_of_a_png_turns_it():
    exif = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    chunks = odd_images.png(3, 2, content=b"\0abc\0def")
    body, end = chunks[:-12], chunks[-12:]
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    data = body + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + end
    assert images.header(data).upright_size == (3, 2)
    assert images.pixels(data).shape == (3, 2, 3)


def test_two_categories_of_one_name_are_warned_of(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(png())
    listed = {
        "images": [{"id": 1, "file_name": "a.png", "width": 4, "height": 4}],
        "categories": [{"id": 0, "name": "face"}, {"id": 1, "name": "face"}],
        "annotations": [],
    }
    path = write(tmp_path / "c.json", json.dumps(listed))
    open_source({"source": "coco", "name": str(path), "images": str(tmp_path)})
    assert "c.json: several categories are called 'face'" in caplog.text


def test_a_line_break_in_the_name_of_a_column_stays_in_its_line(tmp_path):
    path = write(tmp_path / "t.csv", 'image,"la\nbel"\na.png,x\n')
    refuses(r"has no column 'kind'; valid: image, la\\nbel", "table", path, label="kind")
