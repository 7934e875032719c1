"""Opening sources by name, their keys, and the arrays of the .npz source."""

import io
import zipfile

import numpy as np
import pytest

from vit_jax.data import Source, open_source
from vit_jax.data.sources import npz as npz_source
from vit_jax.data.sources._splits import split_range
from vit_jax.errors import UserError


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "train.npz"
    images = np.arange(10 * 2 * 2, dtype=np.uint8).reshape(10, 2, 2, 1)
    names = np.array(["zero", "one", "two"])
    np.savez(path, image=images, label=np.arange(10) % 3, class_names=names)
    return path


class Mine:
    """A source that a user might write."""

    num_classes = 2
    class_names = None
    fingerprint = "mine"

    def __init__(self, name, colour="grey", strict: bool = True, first: int = 1, end: str = ".x"):
        self.name, self.colour = name, colour
        self.given = strict, first, end

    def __len__(self):
        return 1

    def fetch(self, indices):
        return {"image": np.zeros((len(indices), 1, 1, 3), np.uint8)}

    def describe(self, index):
        return str(index)


def test_npz_holds_what_was_saved(npz):
    source = open_source({"source": "npz", "name": str(npz), "split": "train[2:6]"})
    assert isinstance(source, Source)
    assert len(source) == 4
    assert source.class_names == ("zero", "one", "two")
    records = source.fetch(np.array([3, 0]))
    assert records["label"].tolist() == [2, 2]
    assert records["label"].dtype == np.int32
    assert records["image"][1].ravel().tolist() == [8, 9, 10, 11]
    assert "record 5" in source.describe(3)


def test_npz_folder_has_a_file_for_each_split(npz):
    source = open_source({"source": "npz", "name": str(npz.parent), "split": "train[:50%]"})
    assert len(source) == 5
    with pytest.raises(UserError, match=r"no such .npz file: .*test.npz"):
        open_source({"source": "npz", "name": str(npz.parent), "split": "test"})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((2, 3, 3, 3), np.uint8)}, "no array 'label'"),
        ({"image": np.zeros((2, 3, 3, 3)), "label": np.arange(2)}, "must be uint8"),
        ({"image": np.zeros((2, 3, 3, 3), np.uint8), "label": np.arange(3)}, r"integer \[2\]"),
        ({"image": np.zeros((1, 3, 3, 3), np.uint8), "label": np.array([-1])}, "labels from 0"),
        ({"image": np.array([{}, {}]), "label": np.arange(2)}, "not a readable"),
        ({"image": np.zeros((1, 1, 1, 3), np.uint8), "label": [2**40]}, "labels from 0 to 999,999"),
        (
            {"image": np.zeros((1, 1, 1, 3), np.uint8), "label": [0], "class_names": [[1.0]]},
            r"'class_names' must be texts \[classes\], not float64 \[1, 1\]",
        ),
    ],
)
def test_npz_says_what_is_wrong(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message):
        open_source({"source": "npz", "name": str(path)})


def test_names_of_classes_in_an_npz_may_be_bytes(tmp_path):
    arrays = {"image": np.zeros((2, 1, 1, 3), np.uint8), "label": np.arange(2)}
    np.savez(tmp_path / "x.npz", **arrays, class_names=np.array([b"cat", b"dog"]))
    source = open_source({"source": "npz", "name": str(tmp_path / "x.npz")})
    assert source.class_names == ("cat", "dog")


def test_an_npz_that_would_take_all_memory_is_refused(tmp_path, monkeypatch):
    """Zeros that are compressed to nothing, and a header that claims too much."""
    monkeypatch.setattr(npz_source, "ALWAYS_UNPACKED", 1 << 16)
    path, image, label = tmp_path / "bomb.npz", io.BytesIO(), io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 3, 3, 3)}
    np.lib.format.write_array_header_1_0(image, header)
    np.save(label, np.arange(3))
    for size, message in (
        (1 << 20, "no images are compressed so well"),
        (5, r"image.npy has another size than its header tells"),
    ):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("image.npy", image.getvalue() + bytes(size))
            archive.writestr("label.npy", label.getvalue())
        with pytest.raises(UserError, match=message):
            open_source({"source": "npz", "name": str(path)})


def test_a_file_that_is_no_archive(tmp_path):
    """Text, an array alone, and an archive that is cut short or damaged."""
    path = tmp_path / "whole.npz"
    np.savez_compressed(path, image=np.zeros((2, 3, 3, 3), np.uint8), label=np.arange(2))
    whole, alone = path.read_bytes(), io.BytesIO()
    np.save(alone, np.zeros(3))
    damaged = whole[:50] + bytes(20) + whole[70:]
    for content in (b"not an archive", alone.getvalue(), whole[:-40], damaged):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a readable"):
            open_source({"source": "npz", "name": str(path)})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"source": ""}, "write the name of a data source"),
        ({"source": "fak"}, "did you mean 'fake'"),
        ({"source": "fake", "num_exmples": 3}, "did you mean 'num_examples'"),
        ({"source": "npz", "name": "x", "image_size": 3}, "image_size=3 is no key of source 'npz'"),
        ({"source": "npz"}, "needs the key 'name'"),
        ({"source": "captions", "name": "x", "images": ""}, "needs the key 'images'"),
        ({"source": "coco", "name": "x", "images": ".", "max_objects": 0}, "=0: write 1 or more"),
        ({"source": "npz", "name": "x", "split_seed": "a"}, "args.split_seed='a': write a whole n"),
        ({"source": "fake", "num_examples": -3}, "args.num_examples=-3: write 0 or more"),
        ({"source": "fake", "image_size": 2.5}, "args.image_size=2.5: write a whole number"),
        ({"source": "captions", "name": "x", "images": ".", "max_texts": True}, "max_texts=True"),
        ({"source": "table", "name": "x", "separator": 5}, "args.separator=5: write a text"),
        ({"source": "no.such.module:Source"}, "No module named 'no'"),
        ({"source": "vit_jax.data.sources.npz:Sorce"}, "did you mean 'Source'"),
    ],
)
def test_spec_errors(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_unset_keys_of_other_sources_are_ignored(npz):
    spec = {"source": "npz", "name": str(npz), "dir": "", "num_examples": 0, "image_size": None}
    assert len(open_source(spec)) == 10


def test_code_from_elsewhere(monkeypatch):
    monkeypatch.setattr("vit_jax.data.sources.Mine", Mine, raising=False)
    source = open_source({"source": "vit_jax.data.sources:Mine", "name": "n", "colour": "red"})
    assert (source.name, source.colour) == ("n", "red")
    assert source.given == (True, 1, ".x")
    no = {"strict": False, "first": 0, "end": ""}
    assert open_source({"source": "vit_jax.data.sources:Mine", "name": "n", **no}).given == (
        *(False, 0, ""),
    )


def test_each_class_has_one_name(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    arrays = {"image": np.zeros((5, 2, 2, 1), np.uint8), "label": np.arange(5)}
    np.savez(path, **arrays, class_names=["a", "b", "c"])
    with pytest.raises(UserError, match="has 3 class names for 5 classes; give each class one"):
        open_source({"source": "npz", "name": str(path)})
    monkeypatch.setattr("vit_jax.data.sources.Mine", Mine, raising=False)
    monkeypatch.setattr(Mine, "class_names", ("one",))
    with pytest.raises(UserError, match="mine has 1 class names for 2 classes"):
        open_source({"source": "vit_jax.data.sources:Mine", "name": "n"})


def test_code_from_elsewhere_that_is_no_source(monkeypatch):
    monkeypatch.setattr("vit_jax.data.sources.Mine", Mine, raising=False)
    monkeypatch.delattr(Mine, "describe")
    with pytest.raises(UserError, match="it lacks describe"):
        open_source({"source": "vit_jax.data.sources:Mine", "name": "n"})


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:80%]", range(8)),
        ("train[80%:]", range(8, 10)),
        ("train[3:-2]", range(3, 8)),
        ("[:4]", range(4)),
        ("train[:99]", range(10)),
        ("train[25%:75%]", range(2, 8)),
    ],
)
def test_split_ranges(split, expected):
    assert split_range(split, 10) == expected


@pytest.mark.parametrize("split", ["train[5:5]", "train[", "train[a:b]", "train[9:2]"])
def test_split_errors(split):
    with pytest.raises(UserError, match="split"):
        split_range(split, 10)


def test_a_part_without_a_class_says_so_whatever_the_source(npz, tmp_path, caplog):
    assert len(open_source({"source": "npz", "name": str(npz), "split": "train[:50%]"})) == 5
    assert not caplog.text
    open_source({"source": "npz", "name": str(npz), "split": "train[:2]"})
    assert "npz:train.npz:train[:2]:2 has no example of 1 of 3 classes (two)" in caplog.text
    caplog.clear()
    np.savez(tmp_path / "one.npz", image=np.zeros((2, 2, 2, 1), np.uint8), label=np.zeros(2, int))
    open_source({"source": "npz", "name": str(tmp_path / "one.npz"), "split": "train"})
    assert "has the class '0' alone" in caplog.text
