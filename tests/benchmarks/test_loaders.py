"""Other loaders on a folder of images: what is compared, and the refusal of what cannot be."""

import importlib
import sys

import numpy as np
import pytest
import timm_loader
from PIL import Image
from serving import WARM_UP, UserMistake, timing


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        path = tmp_path / "images" / f"{number}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 50), (number, 0, 0)).save(path, format="JPEG")
    return str(tmp_path / "images")


@pytest.mark.parametrize(
    ("pp", "expected"),
    [
        ("decode_jpeg_and_inception_crop(224)|flip_lr", (224, None)),
        ("decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2,10)", (224, "rand-m10-n2")),
    ],
)
def test_the_same_augmentation_in_timms_words(pp, expected):
    assert timm_loader.transforms_of(pp) == expected


def test_other_preprocessing_is_refused():
    with pytest.raises(UserMistake, match="with or without"):
        timm_loader.transforms_of("decode|resize(224)")


def test_without_timm_it_says_what_to_install(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserMistake, match=r"pip install -e '\.\[bench\]'"):
        timm_loader.prepare(folder, "decode_jpeg_and_inception_crop(32)|flip_lr", "2")


def test_plain_tfrecords(folder):
    import tfrecord_loader

    pp = "decode_jpeg_and_inception_crop(32)|flip_lr"
    batch = next(iter(tfrecord_loader._dataset(write(folder, pp), pp, 2, 1)))
    assert batch["image"].shape == (2, 32, 32, 3)
    assert tfrecord_loader.prepare(folder, pp, "2")(2) > 0


def write(folder, pp):
    import tfrecord_loader

    tfrecord_loader.prepare(folder, pp, "2")
    return f"{folder}.tfrecord"


def test_timms_loader_itself(folder):
    """The loader gives uint8 images of the right size; this needs timm."""
    pytest.importorskip("torch", reason="needs the extra `bench`")
    pp = "decode_jpeg_and_inception_crop(32)|flip_lr"
    shapes = [tuple(images.shape) for images, _ in timm_loader.loader(folder, pp, 4, 2, 0)]
    assert shapes == [(4, 3, 32, 32)] * 2


@pytest.mark.parametrize("rival", ["grain", "ffcv"])
def test_loaders_without_randaugment_or_not_installed_say_so(rival, monkeypatch, folder):
    module = importlib.import_module(f"{rival}_loader")
    pp = "decode_jpeg_and_inception_crop(32)|flip_lr"
    with pytest.raises(UserMistake, match="has no RandAugment"):
        module.prepare(folder, f"{pp}|randaug(2,10)", "2")
    monkeypatch.setitem(sys.modules, rival, None)
    with pytest.raises(UserMistake, match=f"needs {rival.upper()[0]}.*pip install {rival}"):
        module.prepare(folder, pp, "2")


def test_batches_of_more_images_than_an_epoch_has_are_refused(folder):
    """The loader leaves out what is left of an epoch, and would never give a batch."""
    module = importlib.import_module("ffcv_loader")
    with pytest.raises(UserMistake, match=r"reads 4 images; write config\.batch_size=4 or less"):
        module.loader(folder, 32, 5, 1)


def test_a_loader_is_timed_over_as_many_epochs_as_it_takes():
    begun = []

    class Loader:
        def __iter__(self):
            begun.append(self)
            return iter("ab")

    assert timing(Loader())(2 * 3 - WARM_UP) >= 0
    assert len(begun) == 3


def test_grain_reads_images_that_pillow_crops(folder):
    import grain_loader

    data = grain_loader.Files(folder)[3]
    crop = grain_loader.crop_and_flip(data, 32, np.random.default_rng(0))
    assert crop.shape == (32, 32, 3)
    assert abs(crop[..., 0].astype(int) - 3).max() <= 2
    pytest.importorskip("grain", reason="needs grain")
    assert next(iter(grain_loader.loader(folder, 32, 2, 0))).shape == (2, 32, 32, 3)
