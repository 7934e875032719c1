"""Folders of images and masks: layouts, palettes, and every bad file named."""

import io
import zlib

import numpy as np
import odd_images
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vit_jax.data import eval_batches, open_source, train_batches
from vit_jax.errors import UserError

PP = "joint_decode|check_segmentation(4)"


def write(root, name, mask, *, images="images", masks="masks", ends=(".png", ".png")):
    image = np.full((6, 8, 3), 7, np.uint8)
    for folder, end, picture in ((images, ends[0], Image.fromarray(image)), (masks, ends[1], mask)):
        path = root / folder / f"{name}{end}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            picture.save(path)


def mask(value=3, size=(6, 8)):
    return Image.fromarray(np.full(size, value, np.uint8))


def palette(value):
    picture = mask(value)
    picture.putpalette([10, 20, 30] * 256)
    return picture


def source(root, split="train", **args):
    return open_source({"source": "segmentation_folder", "name": str(root), "split": split, **args})


def only(opened, pp=PP):
    count = len(opened)
    (batch,) = eval_batches(opened, batch_size=count, rows=np.arange(count), pp=pp)
    return batch


def test_grey_and_palette_masks_give_the_numbers_in_the_file(tmp_path):
    write(tmp_path, "train/a", mask(3))
    write(tmp_path, "train/deep/b", palette(2))
    write(tmp_path, "val/c", mask(255))
    batch = only(source(tmp_path))
    assert batch["segmentation"].shape == (2, 6, 8, 1)
    assert sorted(np.unique(batch["segmentation"])) == [2, 3]
    assert (only(source(tmp_path, "val"))["segmentation"] == 255).all()
    assert source(tmp_path, class_names=("x", "y")).num_classes == 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_give_the_numbers_in_the_file(tmp_path, bits):
    numbers = np.arange(8) % 2**bits
    packed = np.packbits((numbers[:, None] >> np.arange(bits)[::-1]) & 1).tobytes()

    def chunk(name, content):
        checksum = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + checksum

    header = np.array([8, 6], ">u4").tobytes() + bytes([bits, 0, 0, 0, 0])
    content = [(b"IHDR", header), (b"IDAT", zlib.compress(6 * (b"\0" + packed))), (b"IEND", b"")]
    write(tmp_path, "train/a", b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in content))
    found = only(source(tmp_path), "joint_decode")["segmentation"]
    np.testing.assert_array_equal(found[0, :, :, 0], np.tile(numbers, (6, 1)))


def test_the_texts_in_a_mask_do_not_matter(tmp_path):
    texts = PngInfo()
    texts.add_text("drawn with", 2_000_000 * "x", zip=True)
    write(tmp_path, "a", palette(2))
    palette(2).save(tmp_path / "masks/a.png", pnginfo=texts)
    (found,) = source(tmp_path).fetch(np.array([0]))["segmentation"]
    assert (np.asarray(Image.open(io.BytesIO(found))) == 2).all()


def test_layouts_of_cityscapes_and_voc(tmp_path):
    ends = ("_leftImg8bit.png", "_gtFine_labelIds.png")
    write(tmp_path, "val/ulm/x", mask(1), images="leftImg8bit", masks="gtFine", ends=ends)
    names = {"images": "leftImg8bit", "masks": "gtFine"}
    assert len(source(tmp_path, "val", **names, image_end=ends[0], mask_end=ends[1])) == 1
    for stem in "pqr":
        write(tmp_path, stem, palette(1), images="JPEGImages", masks="Class")
    (tmp_path / "val.txt").write_text("p\nr\n")
    listed = {"images": "JPEGImages", "masks": "Class", "listed": "{split}.txt"}
    assert len(source(tmp_path, "val", **listed)) == 2
    (tmp_path / "train.txt").write_text("gone\n")
    with pytest.raises(UserError, match="gone is listed, but no such image"):
        source(tmp_path, "train", **listed)


def test_listed_names_may_hold_spaces(tmp_path):
    for stem in ("my cat", "dog"):
        write(tmp_path, stem, mask())
    (tmp_path / "train.txt").write_text("\ufeffmy cat \r\n\ndog\n", encoding="utf-8")
    assert len(source(tmp_path, listed="{split}.txt")) == 2


def test_an_image_and_its_mask_come_once(tmp_path):
    for stem in "ab":
        write(tmp_path, f"train/{stem}", mask())
    (tmp_path / "train.txt").write_text("train/b\ntrain/a\ntrain/b\n")
    with pytest.raises(UserError, match=r"images/train/b.png is listed twice"):
        source(tmp_path, listed="{split}.txt")
    Image.new("RGB", (8, 6)).save(tmp_path / "images/train/a.jpg")
    with pytest.raises(UserError, match=r"train/a.jpg and .*train/a.png have one mask, .*a.png"):
        source(tmp_path)


def test_classes_may_be_named_in_a_file(tmp_path):
    write(tmp_path, "train/a", mask())
    (tmp_path / "names.txt").write_text("\ufeffroad\ncar\n", encoding="utf-8")
    named = source(tmp_path, class_names=str(tmp_path / "names.txt"))
    assert (named.class_names, named.num_classes) == (("road", "car"), 2)
    with pytest.raises(UserError, match="class_names has 2 names, and num_classes is 4"):
        source(tmp_path, class_names=("road", "car"), num_classes=4)


def test_a_mask_of_too_many_pixels_is_not_decoded(tmp_path):
    small, path = mask(size=(1, 1)), tmp_path / "masks/train/a.png"
    write(tmp_path, "train/a", small)
    data = bytearray(path.read_bytes())
    data[16:24] = np.array([60_000, 60_000], ">u4").tobytes()
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"a.png: 60,000 x 60,000 pixels are too many"):
        source(tmp_path).fetch(np.array([0]))


@pytest.mark.parametrize("kind", [mask, palette])
def test_truncated_masks_are_skipped(tmp_path, kind):
    for stem in "abcd":
        write(tmp_path, stem, kind(1))
    path = tmp_path / "masks/b.png"
    path.write_bytes(path.read_bytes()[:-30])
    options = {"batch_size": 4, "rows": np.arange(4), "pp": PP}
    with train_batches(source(tmp_path), seed=0, on_bad_image="skip", **options) as batches:
        next(batches)
        assert batches.num_bad_images
    with pytest.raises(UserError, match=r"bad image .*images/b\.png"):
        only(source(tmp_path))


def test_parts_of_one_folder_share_nothing(tmp_path):
    for stem in "abcdefgh":
        write(tmp_path, stem, mask())
    parts = [source(tmp_path, split) for split in ("train[:75%]", "train[75%:]")]
    names = [{part.describe(i) for i in range(len(part))} for part in parts]
    assert [len(one) for one in names] == [6, 2]
    assert not names[0] & names[1]
    with pytest.raises(UserError, match=r"no folder 'val'.*train\[90%:\]"):
        source(tmp_path, "val")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (mask(3, (5, 5)), r"bad image .*images/a.png.*segmentation is\] \[5 5\].*image\] \[6 8\]"),
        (mask(9), r"bad image .*images/a.png.*label\] \[9\] \[but only 4 classes"),
        (b"JFIF", "masks/a.png is no PNG file"),
        (b"", "masks/a.png is no PNG file"),
        (Image.new("RGB", (8, 6)), "masks/a.png is a PNG of colours"),
        (Image.new("I;16", (8, 6)), "masks/a.png is a PNG of colours or 16 bits"),
    ],
    ids=["size", "range", "jpeg", "empty", "colours", "deep"],
)
def test_bad_masks_name_the_record(tmp_path, picture, message):
    write(tmp_path, "a", picture)
    with pytest.raises(UserError, match=message):
        only(source(tmp_path))


def test_empty_images_name_the_record(tmp_path):
    write(tmp_path, "a", mask())
    write(tmp_path, "b", mask())
    (tmp_path / "images/a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"bad image .*images/a\.png"):
        only(source(tmp_path))


def test_missing_folders_and_masks(tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*images"):
        source(tmp_path)
    write(tmp_path, "a", mask())
    (tmp_path / "masks/a.png").unlink()
    with pytest.raises(UserError, match=r"images/a.png has no mask .*masks/a.png"):
        source(tmp_path)
    (tmp_path / "images/a.png").unlink()
    with pytest.raises(UserError, match="images has no images"):
        source(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_their_masks_are(tmp_path, orientation):
    for name, upright in (("a", True), ("b", False)):
        write(tmp_path, name, mask())
        data = odd_images.turned(odd_images.photograph(8, 6), orientation)
        (tmp_path / "images" / f"{name}.png").write_bytes(data)
        size = (6, 8) if upright or orientation < 5 else (8, 6)
        mask(size=size).save(tmp_path / "masks" / f"{name}.png")
    batches = eval_batches(source(tmp_path), batch_size=1, rows=np.arange(1), pp="joint_decode")
    assert len([batch["image_size"] for batch in batches]) == 2  # Image and mask have one size.


@pytest.mark.parametrize("name", ["/etc/passwd", "../images/a", "a/../../b"])
def test_lists_cannot_name_files_elsewhere(tmp_path, name):
    write(tmp_path, "a", mask())
    (tmp_path / "train.txt").write_text(f"a\n{name}\n")
    with pytest.raises(UserError, match=r"train.txt: line 2 names the file .* not in the folder"):
        source(tmp_path, listed="{split}.txt")
