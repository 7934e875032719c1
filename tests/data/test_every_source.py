"""Properties that every source has: pure batches, exact resume, odd files read or named."""

import csv
import functools
import gzip
import itertools
import json
import os
import warnings

import numpy as np
import odd_images
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from tar_files import tar_of

from vit_jax import data
from vit_jax.data import graph, images
from vit_jax.data.sources import SOURCES
from vit_jax.errors import UserError
from vit_jax.plugins import names_in

COUNT = 23
BATCH = 8
STEPS = 7
# Names that file systems allow and people have.
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]),
    min_size=1,
    max_size=12,
).filter(lambda name: not name.startswith(".") and name.strip() == name)


@functools.cache
def picture(number):
    return odd_images.encoded(odd_images.photograph(8, 6, number), "PNG")


@functools.cache
def odd_pictures():
    """Pictures, among them one of a single pixel and one of 100 megapixels."""
    one_pixel = odd_images.png(1, 1, content=b"\0\7")
    return [one_pixel, odd_images.large_png(), *map(picture, range(2, COUNT))]


def in_folder(root, folder="", names=None):
    """Writes the images, and returns their names below `root`."""
    found = []
    for number in range(COUNT):
        found.append(os.path.join(folder, f"{number:02}.png" if names is None else names[number]))
        path = root / found[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return found


def csv_of(root, header, rows, name="t.csv"):
    with open(root / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return {"name": str(root / name)}


def npz(root):
    arrays = {"image": np.arange(COUNT * 4, dtype=np.uint8).reshape(COUNT, 2, 2, 1)}
    np.savez(root / "a.npz", **arrays, label=np.arange(COUNT) % 3)
    return {"name": str(root / "a.npz")}


def folder(root):
    for label in ("a", "b"):
        in_folder(root, label)
    return {"name": str(root)}


def image_files(root):
    in_folder(root, "deep/er")
    return {"name": str(root)}


def table(root):
    return csv_of(root, ("path", "label"), [(x, i % 3) for i, x in enumerate(in_folder(root))])


def captions(root):
    rows = [(x, f"text {x}") for x in in_folder(root)]
    return {**csv_of(root, ("image", "caption"), rows), "images": str(root)}


def webdataset(root):
    for shard in range(3):
        members = [
            (f"{number:03}.{end}", content)
            for number in range(shard, COUNT, 3)
            for end, content in (("png", picture(number)), ("cls", b"%d" % (number % 2)))
        ]
        (root / f"train-{shard}.tar").write_bytes(tar_of(members))
    return {"name": str(root / "{split}-*.tar")}


def idx(root):
    arrays = (np.arange(COUNT * 6, dtype=np.uint8).reshape(COUNT, 2, 3), np.arange(COUNT) % 4)
    for what, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        content = gzip.compress(header + array.astype(np.uint8).tobytes())
        (root / f"train-{what}-ubyte.gz").write_bytes(content)
    return {"name": str(root)}


def coco(root):
    return coco_of(root, in_folder(root))


def coco_of(root, names):
    rows = [{"id": i, "file_name": name, "width": 8, "height": 6} for i, name in enumerate(names)]
    boxes = [
        {"image_id": i, "category_id": 1, "bbox": [1, 1, 2 + i % 3, 3]} for i in range(len(names))
    ]
    stored = {"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
    (root / "train.json").write_text(json.dumps(stored))
    return {"name": str(root / "train.json"), "images": str(root)}


def segmentation_folder(root):
    return masks_of(root, "images", in_folder(root, "images"))


def masks_of(root, images, names):
    """Writes a mask for each image in the folder `images`."""
    for number, name in enumerate(names):
        path = root / "masks" / f"{os.path.splitext(os.path.relpath(name, images))[0]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(odd_images.encoded(Image.new("L", (8, 6), number % 3), "PNG"))
    return {"name": str(root), "images": images}


def tfds(root):
    from vit_jax.data.prepare import prepare

    prepare("digits", str(root))
    return {"name": "digits", "dir": str(root), "split": f"train[:{COUNT}]"}


def fake(root):
    return {"name": "fake", "encoded": True, "num_examples": COUNT}


MAKERS = {
    "npz": npz, "folder": folder, "image_files": image_files, "table": table, "tfds": tfds,
    "captions": captions, "webdataset": webdataset, "idx": idx, "coco": coco, "fake": fake,
    "segmentation_folder": segmentation_folder,
}  # fmt: skip


def test_every_source_is_here():
    assert set(MAKERS) == set(names_in(SOURCES.package))


def balanced(root):
    """Opens a table with a rare class, whose examples are repeated."""
    rows = [(name, "rare" if i % 10 == 3 else "often") for i, name in enumerate(in_folder(root))]
    opened = data.open_source({"source": "table", **csv_of(root, ("path", "label"), rows)})
    found = data.balanced(opened, 1.0, seed=5)
    assert len(found) > COUNT + BATCH
    return found


class Raw:
    """A stream of what sources hold, in place of TensorFlow's graph."""

    def __init__(self, reader, feed, pp, workers):
        self._batches = map(feed.load, feed.steps)

    def __next__(self):
        batch = next(self._batches)
        return {**batch.records, "seeds": batch.seeds}

    def close(self):
        pass


@pytest.fixture(scope="module", params=sorted([*MAKERS, "balanced"]))
def source(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "PreprocessedStream", Raw)
        if request.param == "balanced":
            yield balanced(root)
        else:
            yield data.open_source({"source": request.param, **MAKERS[request.param](root)})


def batches(source, rows=range(BATCH), start=0, count=STEPS):
    stream = data.train_batches(
        source, batch_size=BATCH, rows=np.array(rows), seed=5, start_step=start, pp="raw"
    )
    with stream:
        return list(itertools.islice(stream, count))


def test_batches_are_those_of_seed_and_step_on_any_processes_and_after_a_restart(source):
    """Seven batches pass the end of an epoch, so that the order of the second is compared, too."""
    whole = batches(source)
    for processes in (2, 4):
        each = BATCH // processes
        parts = [batches(source, range(first, first + each)) for first in range(0, BATCH, each)]
        for step, expected in enumerate(whole):
            for key, value in expected.items():
                joined = np.concatenate([part[step][key] for part in parts])
                np.testing.assert_array_equal(joined, value, err_msg=key)
    for start in (1, 5):
        (resumed,) = batches(source, start=start, count=1)
        for key, value in whole[start].items():
            np.testing.assert_array_equal(resumed[key], value, err_msg=key)


def test_a_record_is_the_same_in_any_company(source):
    """Records depend on their number alone, and a name on one line tells where one comes from."""
    order = np.random.default_rng(0).permutation(len(source))
    together = source.fetch(order)
    for place in (0, 7, len(source) - 1):
        alone = source.fetch(order[place : place + 1])
        for key, value in alone.items():
            np.testing.assert_array_equal(value[0], together[key][place])
        assert source.describe(int(order[place])).isprintable()
    assert source.fingerprint


@settings(max_examples=5, deadline=None)
@given(st.lists(NAMES, min_size=COUNT, max_size=COUNT, unique_by=str.casefold))
def test_files_may_have_any_names(tmp_path_factory, names):
    """Every file is read once, by each source that reads files, whatever its name.

    Hidden files are passed over, and links are followed.
    """
    root = tmp_path_factory.mktemp("names")
    photos = os.path.join("all", "photos")
    names = [os.path.join(photos, f"{name}.png") for name in names]
    (root / photos).mkdir(parents=True)
    for name, content in zip(names, odd_pictures(), strict=True):
        (root / name).write_bytes(content)
    (root / names[-1]).rename(root / ".elsewhere.png")
    (root / names[-1]).symlink_to(root / ".elsewhere.png")
    (root / photos / "._hidden.png").write_bytes(b"")
    rows = [(name, "x" if i else "y") for i, name in enumerate(names)]
    lines = csv_of(root, ("image", "caption"), rows, "captions.csv")
    specs = [
        {"source": "folder", "name": str(root / "all")},
        {"source": "image_files", "name": str(root / "all")},
        {"source": "table", **csv_of(root, ("path", "label"), rows)},
        {"source": "captions", **lines, "images": str(root)},
        {"source": "coco", **coco_of(root, names)},
        {"source": "segmentation_folder", **masks_of(root, photos, names)},
    ]
    expected = sorted(map(hash, odd_pictures()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for spec in specs:
            opened = data.open_source(spec)
            found = opened.fetch(np.arange(len(opened)))["image"]
            assert sorted(map(hash, found)) == expected, spec["source"]
            assert all(opened.describe(i).isprintable() for i in range(COUNT))


@pytest.mark.parametrize("kind", ["captions", "coco", "image_files", "segmentation_folder"])
def test_sources_without_classes_have_folds(tmp_path, kind):
    spec = {"source": kind, **MAKERS[kind](tmp_path)}
    parts = [
        data.open_source({**spec, "split": f"train[{which}fold 2 of 4]"})
        for which in ("", "all but ")
    ]
    inside, outside = ({one.describe(i) for i in range(len(one))} for one in parts)
    assert (len(inside), len(outside), len(inside | outside)) == (6, COUNT - 6, COUNT)
    with pytest.raises(UserError, match="no classes to take a part of"):
        data.open_source({**spec, "split": "train[1% per class]"})


BAD = {
    **odd_images.unreadable(),
    "link to nothing.png": None,
    "folder.png": ...,
}


FILES = ["folder", "image_files", "table", "captions", "coco", "segmentation_folder"]


@pytest.mark.parametrize("kind", [*FILES, "parquet", "webdataset"])
def test_a_bad_image_is_named_in_one_line_and_the_others_are_read(tmp_path, kind):
    """Evaluation and training say which one it is; with `skip`, training goes on without it."""
    good = picture(0)
    for name, content in BAD.items():
        root = tmp_path / name.replace(".", "_")
        (root / "a").mkdir(parents=True)
        if not isinstance(content, bytes) and kind in ("parquet", "webdataset"):
            continue
        # They look into folders of any name.
        if content is ... and kind in ("image_files", "segmentation_folder"):
            continue
        opened = opened_with(root, kind, good, name, content)
        if opened is None:  # A folder refuses what is no file before anything is read.
            continue
        reasons = []
        for number in range(len(opened)):
            try:
                opened.fetch(np.array([number]))
            except (OSError, UserError) as error:
                reasons.append(f"{opened.describe(number)}: {error}")
        assert len(reasons) <= 1
        # Half a JPEG or PNG passes here, and fails where its pixels are decoded.
        assert reasons or images.header(content).format in ("JPEG", "PNG")
        assert all("\n" not in reason for reason in reasons)


def opened_with(root, kind, good, name, content):
    """Returns a source of `kind` with two good images and a bad one; None if it is refused."""
    if kind in ("parquet", "webdataset"):
        stored = [good, content, good]
        if kind == "parquet":
            parquet.write_table(pa.table({"image": stored, "label": [0, 1, 0]}), root / "t.parquet")
            return data.open_source({"source": "table", "name": str(root / "t.parquet")})
        if not content:
            return None
        members = [
            (f"{number}.{end}", part)
            for number, one in enumerate(stored)
            for end, part in (("png", one), ("cls", b"1"))
        ]
        (root / "t.tar").write_bytes(tar_of(members))
        return data.open_source({"source": "webdataset", "name": str(root / "t.tar")})
    for other in ("x.png", "y.png"):
        (root / "a" / other).write_bytes(good)
    path = root / "a" / name
    if content is None:
        path.symlink_to(root / "nothing")
    elif content is ...:
        path.mkdir()
    else:
        path.write_bytes(content)
    names = [f"a/{one}" for one in ("x.png", name, "y.png")]
    of_names = {
        "table": lambda: csv_of(root, ("path", "label"), [(one, 1) for one in names]),
        "captions": lambda: {
            **csv_of(root, ("image", "caption"), [(one, "text") for one in names]),
            "images": str(root),
        },
        "coco": lambda: coco_of(root, names),
        "segmentation_folder": lambda: masks_of(root, "a", names),
    }
    if kind in of_names:
        return data.open_source({"source": kind, **of_names[kind]()})
    spec = {"source": kind, "name": str(root)}
    if kind == "folder" and content is ...:
        with pytest.raises(UserError, match=r"folder\.png is not an image file"):
            data.open_source(spec)
        return None
    return data.open_source(spec)
