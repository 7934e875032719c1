"""Opening sources by name, their keys, and the arrays of the .npz source."""

import io

import numpy as np
import pytest

from vit_jax.data import Source, open_source
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
    """What a researcher might bring."""

    num_classes = 2
    class_names = None
    fingerprint = "mine"

    def __init__(self, name, colour="grey"):
        self.name, self.colour = name, colour

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
    ],
)
def test_npz_says_what_is_wrong(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
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
