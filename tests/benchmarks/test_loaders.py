"""Other loaders on a folder of images: what is compared, and the refusal of what cannot be."""

import sys

import pytest
import timm_loader
from PIL import Image
from serving import UserMistake


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
