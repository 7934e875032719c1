"""Folders of image files: layouts, class numbers, parts of a split, and what is wrong with them."""

import hashlib
import itertools
import json
import os
import shutil
import time

import numpy as np
import odd_images
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vit_jax.data import element_spec, eval_batches, open_source, train_batches
from vit_jax.data.sources._splits import inner_bounds, with_every_class
from vit_jax.errors import UserError


def write(path, value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (value, value, value)).save(path)


def open_folder(root, split="train"):
    return open_source({"source": "folder", "name": str(root), "split": split, "dir": ""})


@pytest.fixture
def flat(tmp_path):
    """One folder a class, no splits; the pixel value tells the class."""
    for number in range(20):
        write(tmp_path / "cat" / f"{number}.jpg", 50)
        write(tmp_path / "dog" / f"{number}.PNG", 150)
    return tmp_path


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet's layout; a class has no images in one split."""
    for number in range(3):
        for name in ("n01440764", "n02102040", "n03000684"):
            write(tmp_path / "train" / name / f"{name}_{number}.JPEG")
    write(tmp_path / "val" / "n02102040" / "ILSVRC2012_val_1.JPEG")
    write(tmp_path / "val" / "n03000684" / "ILSVRC2012_val_2.jpeg")
    return tmp_path


def test_images_come_with_their_class(flat):
    source = open_folder(flat)
    assert len(source) == 40
    assert source.class_names == ("cat", "dog")
    assert source.num_classes == 2
    (batch,) = eval_batches(source, batch_size=40, rows=np.arange(40), pp="decode|resize(4)")
    brightness = batch["image"].mean((1, 2, 3))
    np.testing.assert_allclose(brightness, np.where(batch["label"] == 0, 50, 150), atol=2)


def test_parts_divide_the_images_and_have_all_classes(flat):
    names = {}
    for split in ("train[:75%]", "train[75%:]"):
        source = open_folder(flat, split)
        names[split] = {source.describe(index) for index in range(len(source))}
        assert set(source.fetch(np.arange(len(source)))["label"]) == {0, 1}
        assert source.num_classes == 2
    assert [len(part) for part in names.values()] == [30, 10]
    assert not set.intersection(*names.values())


def test_the_order_does_not_depend_on_the_file_system(flat, tmp_path_factory):
    source = open_folder(flat)
    copy = tmp_path_factory.mktemp("copy")
    for index in np.random.default_rng(0).permutation(len(source)):
        path = source.describe(index)
        target = copy / path.split("/")[-2]
        target.mkdir(exist_ok=True)
        shutil.copy(path, target)
    again = open_folder(copy)
    tails = [
        ["/".join(one.describe(index).split("/")[-2:]) for index in range(len(one))]
        for one in (source, again)
    ]
    assert tails[0] == tails[1]


def test_classes_are_numbered_by_the_training_split(imagenet):
    train, validation = open_folder(imagenet), open_folder(imagenet, "validation")
    assert train.class_names == validation.class_names
    assert train.class_names == ("n01440764", "n02102040", "n03000684")
    assert sorted(train.fetch(np.arange(9))["label"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sorted(validation.fetch(np.arange(2))["label"]) == [1, 2]
    assert len(open_folder(imagenet, "val")) == 2


def test_a_test_folder_of_unlabelled_images_is_no_class(imagenet):
    write(imagenet / "test" / "all" / "1.jpg")
    write(imagenet / "test" / "all" / "2.jpg")
    assert open_folder(imagenet).class_names == ("n01440764", "n02102040", "n03000684")
    assert open_folder(imagenet, "val").num_classes == 3
    with pytest.raises(UserError, match=r"test has the class all, which \S+train lacks: rename"):
        open_folder(imagenet, "test")


def test_splits_without_training_share_their_classes(imagenet):
    shutil.rmtree(imagenet / "train")
    write(imagenet / "test" / "n01440764" / "1.jpg")
    assert open_folder(imagenet, "val").class_names == ("n01440764", "n02102040", "n03000684")


def test_flat_images_of_a_split_have_no_class(imagenet):
    shutil.rmtree(imagenet / "val")
    write(imagenet / "val" / "ILSVRC2012_val_1.JPEG")
    with pytest.raises(UserError, match=r"val has no class folders: .*val/CLASS/photo\.jpg"):
        open_folder(imagenet, "val")


def test_folders_are_local():
    with pytest.raises(UserError, match="gs://b/x: image folders are read from local disks"):
        open_folder("gs://b/x")


def test_a_set_of_the_size_and_oddities_of_imagenet(tmp_path):
    """A thousand classes; among the JPEGs a CMYK one, a PNG with the wrong name, a broken one."""
    for number in range(1000):
        folder = tmp_path / "train" / f"n{number:08}"
        folder.mkdir(parents=True)
        size = (20 + number % 37, 16 + number % 23)
        Image.new("RGB", size, (number % 256, 128, 0)).save(folder / f"{number}_0.JPEG")
    Image.new("CMYK", (30, 20), (0, 0, 0, 255)).save(tmp_path / "train/n00000003/3_0.JPEG")
    Image.new("RGB", (30, 20), (5, 5, 5)).save(tmp_path / "train/n00000005/5_0.JPEG", "PNG")
    (tmp_path / "train/n00000007/7_0.JPEG").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    source = open_folder(tmp_path)
    assert source.num_classes == len(source) == 1000
    pp = "decode_jpeg_and_inception_crop(8)|flip_lr"
    options = {"batch_size": 250, "rows": np.arange(250), "seed": 0, "pp": pp}
    with train_batches(source, **options, on_bad_image="skip") as batches:
        epoch = [next(batches) for _ in range(4)]
        assert len(batches.bad_images) == 1
        assert "n00000007/7_0.JPEG: " in batches.bad_images[0]
    labels = np.concatenate([batch["label"] for batch in epoch])
    assert len(set(labels)) == 999
    images = np.concatenate([batch["image"] for batch in epoch])
    assert images[labels == 3].max() < 10
    np.testing.assert_array_equal(images[labels == 5], 5)


def test_hidden_files_are_passed_over(flat):
    (flat / "cat" / ".DS_Store").write_text("x")
    (flat / "cat" / "Thumbs.db").write_text("x")
    (flat / ".cache").mkdir()
    assert len(open_folder(flat)) == 40


@pytest.mark.soak
def test_a_hundred_thousand_files_open_in_two_seconds(tmp_path):
    """The names are links to one file for each class, since file systems limit links to a file.

    The time is that of this process, so that others on the machine do not count.
    """
    for label in range(100):
        first = tmp_path / "train" / f"{label:03}" / "0.jpg"
        write(first)
        for number in range(1, 1000):
            os.link(first, first.with_name(f"{number}.jpg"))
    seconds = []
    for _ in range(3):
        started = time.process_time()
        assert len(open_folder(tmp_path)) == 100_000
        seconds.append(time.process_time() - started)
    assert min(seconds[1:]) < 2


def test_missing_root(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_folder(tmp_path / "nowhere")


def test_empty_class_folder_is_named(flat):
    (flat / "horse").mkdir()
    with pytest.raises(UserError, match="horse has no images"):
        open_folder(flat)


def test_file_that_is_no_image_is_named(flat):
    (flat / "dog" / "notes.txt").write_text("x")
    (flat / "cat" / "a.PSD").touch()
    with pytest.raises(UserError, match=r"a\.PSD has a format that is not read .*: convert it"):
        open_folder(flat)
    (flat / "cat" / "a.PSD").unlink()
    with pytest.raises(UserError, match=r"notes\.txt is not an image file"):
        open_folder(flat)


def test_folder_inside_a_class_is_named(flat):
    (flat / "dog" / "puppies.jpg").mkdir()
    with pytest.raises(UserError, match=r"puppies\.jpg is not an image file"):
        open_folder(flat)


def test_images_without_class_folders(tmp_path):
    write(tmp_path / "one.jpg")
    with pytest.raises(UserError, match=r"no class folders: .*CLASS/photo\.jpg"):
        open_folder(tmp_path)


def test_split_without_a_folder(imagenet):
    with pytest.raises(UserError, match="it has train, val"):
        open_folder(imagenet, "test")


def test_split_of_a_folder_without_splits(flat):
    with pytest.raises(UserError, match=r"'train\[90%:\]' for validation"):
        open_folder(flat, "validation")


def test_unreadable_and_vanished_files_are_named(flat):
    source = open_folder(flat)
    (flat / "cat" / "3.jpg").write_text("not an image")
    (flat / "dog" / "4.PNG").unlink()
    options = {"batch_size": 40, "rows": np.arange(40), "seed": 0, "pp": "decode|resize(4)"}
    with train_batches(source, **options) as batches:  # noqa: SIM117
        with pytest.raises(UserError, match=r"bad image \S+(cat/3\.jpg|dog/4\.PNG): \w"):
            next(batches)
    with train_batches(source, **options, on_bad_image="skip") as batches:
        assert next(batches)["image"].shape == (40, 4, 4, 3)
        reasons = "\n".join(batches.bad_images)
    assert "cat/3.jpg: " in reasons
    assert "dog/4.PNG: FileNotFoundError" in reasons


def test_a_rare_class_is_in_the_first_part_whatever_the_parts(tmp_path):
    """20 + 1 images: by the hash alone the one would often be held out of training."""
    for number in range(20):
        write(tmp_path / "common" / f"{number}.png")
    for number in range(30):
        folder = tmp_path / "rare"
        shutil.rmtree(folder, ignore_errors=True)
        write(folder / f"{number}.png")
        parts = [open_folder(tmp_path, split) for split in ("train[:50%]", "train[50%:90%]")]
        parts.append(open_folder(tmp_path, "train[90%:]"))
        assert 1 in parts[0].fetch(np.arange(len(parts[0])))["label"]
        names = [part.describe(index) for part in parts for index in range(len(part))]
        assert len(names) == len(set(names)) == 21


def test_parts_that_have_every_class_are_as_they_always_were(flat):
    files = [f"cat/{number}.jpg" for number in range(20)]
    files += [f"dog/{number}.PNG" for number in range(20)]
    files.sort(key=lambda file: hashlib.blake2b(file.encode(), digest_size=8).digest())
    source = open_folder(flat, "train[:90%]")
    assert [source.describe(index) for index in range(36)] == [f"{flat}/{x}" for x in files[:36]]


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.data())
def test_parts_share_nothing_and_the_first_has_every_class_if_there_is_room(labels, data):
    labels = np.array(labels)
    bounds = data.draw(st.lists(st.integers(1, len(labels) - 1), max_size=3, unique=True))
    ends = [0, *sorted(bounds), len(labels)]
    parts = []
    for start, stop in itertools.pairwise(ends):
        inner = inner_bounds(range(start, stop), len(labels))
        parts.append(with_every_class(labels, inner)[start:stop])
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    present = set(labels.tolist())
    if len(parts[0]) >= 2 * len(present):
        assert set(labels[parts[0]].tolist()) == present
    if bounds and all(present == set(labels[:bound].tolist()) for bound in bounds):
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(len(labels)))


def test_a_part_without_a_class_says_so(flat, caplog):
    open_folder(flat, "train[:1]")
    assert "train[:1]:1 has no example of 1 of 2 classes" in caplog.text


def test_split_folders_may_be_capitalized(imagenet):
    (imagenet / "train").rename(imagenet / "Train")
    (imagenet / "val").rename(imagenet / "VAL")
    assert len(open_folder(imagenet)) == 9
    assert open_folder(imagenet, "Validation").num_classes == 3


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train", "test"):
        write(tmp_path / name / "1.jpg")
    assert open_folder(tmp_path).class_names == ("bus", "test", "train")
    with pytest.raises(UserError, match="no folder for the split 'val'"):
        open_folder(tmp_path, "val")


def test_one_class_alone_is_worth_a_warning(tmp_path, caplog):
    write(tmp_path / "cat" / "1.jpg")
    assert open_folder(tmp_path).num_classes == 1
    assert "the class 'cat' alone" in caplog.text


def test_an_accent_in_either_normal_form_is_one_class(tmp_path):
    one, two = "caf\u00e9", "cafe\u0301"
    for split, name in (("train", two), ("val", one)):
        write(tmp_path / split / name / "1.jpg")
        write(tmp_path / split / "zoo" / "1.jpg")
    assert open_folder(tmp_path, "val").class_names == (two, "zoo")
    assert sorted(open_folder(tmp_path, "val").fetch(np.arange(2))["label"]) == [0, 1]
    write(tmp_path / "train" / one / "1.jpg")
    with pytest.raises(UserError, match="two folders 'caf\u00e9', whose names look alike"):
        open_folder(tmp_path)


def test_odd_names_are_read_and_named_on_one_line(tmp_path):
    names = ["a b", "c,d", "山", "x\ny", "$x^$", "[z]", os.fsdecode(b"\xff")]
    for name in names:
        write(tmp_path / name / f"{name}.jpg")
    (tmp_path / "elsewhere.jpg").write_bytes((tmp_path / "a b" / "a b.jpg").read_bytes())
    (tmp_path / "a b" / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (tmp_path / "linked").symlink_to(tmp_path / "山")
    source = open_folder(tmp_path)
    assert len(source) == len(names) + 2
    json.dumps(source.class_names).encode()
    " ".join(source.class_names).encode()
    for index in range(len(source)):
        assert source.fetch(np.array([index]))["image"][0]
        assert source.describe(index).isprintable()


def test_other_formats_are_read_and_turned_upright(tmp_path):
    for name, data in odd_images.readable().items():
        path = tmp_path / "class" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    source = open_folder(tmp_path)
    batches = eval_batches(source, batch_size=4, rows=np.arange(4), pp="decode|resize(4)")
    assert sum(batch["mask"].sum() for batch in batches) == len(source)
    turned = odd_images.turned(odd_images.photograph(), 6)
    for one in (tmp_path / "class").iterdir():
        one.write_bytes(turned)
    for exif, shape in (("apply", (32, 48, 3)), ("ignore", (48, 32, 3))):
        spec = {"source": "folder", "name": str(tmp_path), "exif": exif}
        assert element_spec(open_source(spec), "decode")["image"].shape == shape
    with pytest.raises(UserError, match="exif='off': write apply or ignore"):
        open_source(spec | {"exif": "off"})


def test_every_bad_file_is_skipped_or_named(tmp_path):
    for number in range(20):
        write(tmp_path / "class" / f"{number}.jpg")
    for name, data in odd_images.unreadable().items():
        (tmp_path / "class" / name).write_bytes(data)
    os.mkfifo(tmp_path / "class" / "pipe.jpg")
    source = open_folder(tmp_path)
    options = {"batch_size": 8, "rows": np.arange(8), "pp": "decode_jpeg_and_inception_crop(8)"}
    with train_batches(source, seed=0, on_bad_image="skip", **options) as batches:
        for _ in range(8):
            next(batches)
        found = {one.partition(": ")[0] for one in batches.bad_images}
    assert {name.split("/")[-1] for name in found} == {"pipe.jpg", *odd_images.unreadable()}
