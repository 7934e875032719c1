"""Image files: which are read and how, with TensorFlow and without, upright, within bounds."""

import io
import os
import sys

import numpy as np
import odd_images
import pytest
from PIL import Image

from vit_jax.data import files, images
from vit_jax.data import pp as preprocessing
from vit_jax.data.host_tensorflow import tf
from vit_jax.errors import UserError

ORIENTATIONS = range(1, 9)
READABLE, UNREADABLE = odd_images.readable(), odd_images.unreadable()
SEED = np.array([3, 5], np.int32)
decode = preprocessing.build("decode")


def decoded(data, pp="decode", seed=SEED):
    return np.asarray(preprocessing.build(pp)({"image": tf.constant(data)}, seed)["image"])


def close(a, b, tolerance=12):
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= tolerance


@pytest.mark.parametrize("name", READABLE)
def test_odd_images_are_read_alike_with_and_without_tensorflow(name):
    data = READABLE[name]
    pixels = images.pixels(data)
    assert pixels.dtype == np.uint8
    close(decoded(images.for_decoding(data)), pixels)
    grey = images.pixels(data, channels=1)
    close(decoded(images.for_decoding(data), "decode(channels=1)"), grey)


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_said_in_one_line(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name])
    with pytest.raises(UserError) as raised:
        images.read_pixels(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    with pytest.raises((OSError, UserError)):
        decoded(images.for_decoding(images.read(path)))


def test_an_image_of_100_megapixels_is_decoded():
    data = images.for_decoding(odd_images.large_png())
    found = decoded(data, "decode|resize_small(4)")
    assert found.shape == (4, 4, 3)
    assert (found >= 254).all()  # The means of millions of pixels are truncated.


def test_postscript_never_reaches_an_interpreter(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    with pytest.raises(images.BadImage, match="PostScript, a format that is not read"):
        images.pixels(UNREADABLE["text.jpg"])


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"\xff\x0a\x7f\x21", "JPEG XL, a format that is not read"),
        (b"8BPS\0\1", "Photoshop, a format that is not read"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"<html>", "not an image that is read"),
    ],
)
def test_a_format_that_is_not_read_is_called_by_its_name(start, said):
    with pytest.raises(images.BadImage, match=said):
        images.pixels(start + bytes(100))


def test_a_jpeg_of_twelve_bits_is_refused_by_name():
    jpeg = bytearray(READABLE["grey.jpg"])
    jpeg[jpeg.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(images.BadImage, match="JPEG with 12 bits a sample, a format that is not"):
        images.for_decoding(bytes(jpeg))


def test_images_that_are_passed_over_are_counted(tmp_path, caplog):
    for name in ("a.jpg", "b.PSD", "c.jxl", "notes.txt"):
        (tmp_path / name).touch()
    assert list(images.images_below(tmp_path)) == ["a.jpg"]
    assert "2 images have a format that is not read, such as b.PSD (convert it)" in caplog.text


def test_heif_of_phones_is_read_where_the_plug_in_is():
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    pillow_heif.register_heif_opener()
    picture = odd_images.photograph(64, 48)
    data = odd_images.encoded(picture, "HEIF", quality=-1)
    close(images.pixels(data), np.asarray(picture))
    close(decoded(images.for_decoding(data)), np.asarray(picture))
    assert images.header(data).size == (48, 64)


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        ("PIL._avif", READABLE["plain.avif"], r"^AVIF, which is read after `pip install 'pillow>="),
        (
            "pillow_heif",
            b"\0\0\0\x18ftypheic",
            "^HEIF, which is read after `pip",
        ),
    ],
)
def test_a_format_whose_plug_in_is_absent_is_named_with_what_reads_it(
    monkeypatch, module, data, message
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(images.BadImage, match=message):
        images.for_decoding(data)
    suffix = ".avif" if "avif" in module else ".heic"
    assert suffix in images._optional_suffixes(are_read=False)
    assert suffix not in images._optional_suffixes(are_read=True)
    assert images.how_to_read(f"a{suffix.upper()}").startswith("pip install ")


def test_files_of_other_kinds_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name in ("pipe.jpg", "folder.jpg", "zero.jpg", "loop.jpg", "gone.jpg", "x" * 5000, "a\0b"):
        with pytest.raises(UserError) as raised:
            images.read_pixels(tmp_path / name)
        assert len(str(raised.value)) < 500


def test_messages_show_names_on_one_line():
    assert files.shown("a\nb\x1b[2J.jpg") == r"a\nb\x1b[2J.jpg"
    assert files.shown(os.fsdecode(b"\xff.jpg")) == r"\udcff.jpg"
    assert files.shown("山 é.jpg") == "山 é.jpg"
    assert len(files.shown("x" * 5000)) < 310


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_photographs_are_turned_upright(kind, orientation):
    picture = odd_images.photograph()
    data = odd_images.turned(picture, orientation, kind)
    head = images.header(data)
    assert (head.orientation, head.upright_size) == (orientation, (32, 48))
    close(images.pixels(data), np.asarray(picture))
    close(decoded(images.for_decoding(data)), np.asarray(picture))
    close(decoded(images.for_decoding(data), "decode(precise=True)"), np.asarray(picture))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_photographs_stay_as_stored_where_that_is_asked_for(orientation):
    data = odd_images.turned(odd_images.photograph(), orientation)
    assert images.for_decoding(data, "ignore") == data
    close(decoded(data), images.pixels(data, exif="ignore"))


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_tiff_stays_as_stored_where_that_is_asked_for(orientation, options):
    picture = odd_images.photograph()
    data = odd_images.turned(picture, orientation, "TIFF", **options)
    with Image.open(io.BytesIO(odd_images.turned(picture, orientation, "PNG"))) as image:
        stored = np.asarray(image)
    assert images.header(data).size == stored.shape[:2]
    close(images.pixels(data, exif="ignore"), stored, tolerance=0)
    close(decoded(images.for_decoding(data, "ignore")), stored, tolerance=0)
    close(images.pixels(data), np.asarray(picture), tolerance=0)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_random_crop_lies_where_it_would_in_the_upright_image(orientation):
    picture = odd_images.photograph(64, 40)
    data = images.for_decoding(odd_images.turned(picture, orientation, quality=95))
    upright = images.for_decoding(odd_images.encoded(picture, "JPEG", quality=95))
    for seed in range(8):
        key = np.array([seed, 1], np.int32)
        pp = "decode_jpeg_and_inception_crop(area_min=20)"
        close(decoded(data, pp, key), decoded(upright, pp, key), tolerance=24)


def test_annotations_for_the_image_as_stored_keep_it_so():
    data = odd_images.turned(odd_images.photograph(), 6)
    assert images.for_decoding(data, listed_size=(48, 32)) == data
    for size in ((32, 48), (0, 0), (7, 7)):
        assert images.for_decoding(data, listed_size=size) != data
    upside_down = odd_images.turned(odd_images.photograph(), 3)  # The size cannot tell.
    assert images.for_decoding(upside_down, listed_size=(32, 48)) != upside_down


def test_images_without_orientation_pass_through_unchanged():
    for name in ("grey.jpg", "cmyk.jpg", "progressive.jpg", "png inside.jpg", "palette.png"):
        assert images.for_decoding(READABLE[name]) is READABLE[name]


def test_transparent_images_lie_on_white():
    """Transparent pixels are white for every color below, in each form of transparency."""
    color = Image.new("RGBA", (3, 2), (10, 60, 200, 0))
    color.putpixel((1, 1), (10, 60, 200, 128))
    color.putpixel((2, 1), (10, 60, 200, 255))
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((2, 1), 0)
    files_ = {
        "color": odd_images.encoded(color, "PNG"),
        "webp": odd_images.encoded(color, "WEBP", lossless=True, exact=True),
        "tiff": odd_images.encoded(color, "TIFF"),
        "gray": odd_images.encoded(color.convert("LA"), "PNG"),
        "palette": odd_images.encoded(palette, "PNG", transparency=1),
        "gif": odd_images.encoded(palette, "GIF", transparency=1),
        "one color": odd_images.encoded(Image.new("L", (3, 2), 7), "PNG", transparency=7),
    }
    for name, data in files_.items():
        pixels = images.pixels(data)
        assert (pixels[0] == 255).all(), name
        close(decoded(images.for_decoding(data)), pixels, tolerance=0)
        if name in ("color", "webp", "tiff"):
            assert pixels[1, 2].tolist() == [10, 60, 200]
            close(pixels[1, 1], np.array([132, 157, 227]), tolerance=1)


@pytest.mark.parametrize(
    "exif", [b"", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"]
)
def test_damaged_exif_says_nothing(exif):
    segment = b"\xff\xe1" + (8 + len(exif)).to_bytes(2, "big") + b"Exif\0\0" + exif
    jpeg = odd_images.encoded(odd_images.photograph(), "JPEG")
    assert images.header(jpeg[:2] + segment + jpeg[2:]).orientation == 1


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99])
def test_half_a_jpeg_fails_wherever_the_crop_lies(progressive, share):
    jpeg = odd_images.encoded(odd_images.photograph(200, 160), "JPEG", progressive=progressive)
    cut = jpeg[: int(len(jpeg) * share)]
    crop = preprocessing.build("decode_jpeg_and_inception_crop(8)")
    for data in (images.for_decoding(cut), images.with_end_checked(cut)):
        for seed in range(40):
            with pytest.raises(UserError):
                crop({"image": tf.constant(data)}, np.array([seed, 0], np.int32))


def test_bytes_behind_the_end_change_no_pixel():
    jpeg = odd_images.encoded(odd_images.photograph(64, 40), "JPEG")
    for seed in range(8):
        key = np.array([seed, 0], np.int32)
        crops = [
            decoded(images.for_decoding(data), "decode_jpeg_and_inception_crop", key)
            for data in (jpeg, jpeg + b"\0\0")
        ]
        np.testing.assert_array_equal(*crops)


def test_one_rule_says_which_files_below_a_folder_are_images(tmp_path):
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    for name in (
        "a.jpg", "B.JPEG", "é 山.png", "d,e.webp", "deep/er/x.tif", ".hidden.jpg", "._a.jpg",
        "notes.txt", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/a.jpg", "Thumbs.db",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    outside.mkdir()
    (outside / "linked.png").write_bytes(b"x")
    (root / "link").symlink_to(outside)
    (root / "deep" / "back").symlink_to(root)
    assert list(images.images_below(root)) == [
        "B.JPEG", "a.jpg", "d,e.webp", "deep/er/x.tif", "link/linked.png", "é 山.png",
    ]  # fmt: skip
