"""Preprocessing ops against outputs recorded from big_vision and vision_transformer."""

import io
import itertools
import json

import numpy as np
import pytest
import sampled
from op_runs import ARRAYS, GOLDEN, apply, apply_to_image
from PIL import Image

from vit_jax.data import pp
from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import geometry
from vit_jax.errors import UserError

CASES = json.loads((GOLDEN / "big_vision/pp.json").read_text())["cases"]
EVAL_ARRAYS = np.load(GOLDEN / "vision_transformer/preprocess_eval.io.npz")


def jpeg(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels, options.pop("mode", None)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_big_vision_ops(case):
    if "input_label" in case:
        record = {"label": np.array(case["input_label"], np.int64)}
    elif case.get("encoded_bytes"):
        record = {"image": ARRAYS[case["input_array"]].tobytes()}
    else:
        record = {"image": ARRAYS[case["input_array"]]}
    ours = apply(case["spec"], record)[case["output_key"]]
    golden = ARRAYS[case["name"]]
    assert (ours.shape, ours.dtype.name) == (tuple(case["shape"]), case["dtype"])
    # The recorded versions allow a grey level of difference in resizes; ours needs none.
    sampled.assert_close(ours, golden, atol=0 if ours.dtype == np.uint8 else 1e-6)


@pytest.mark.parametrize(
    ("output", "spec"),
    [
        ("eval", "value_range(-1, 1)|resize(24)"),  # Resized in float, never truncated.
        ("lit_resize", "resize(24)|value_range(-1, 1)"),
        ("lit_crop", "resize_small(24, method='bilinear')|central_crop(24)|value_range(-1, 1)"),
    ],
)
@pytest.mark.parametrize("number", range(5))
def test_vision_transformer_evaluation(number, output, spec):
    ours = apply_to_image(spec, EVAL_ARRAYS[f"{number:02}/raw"])
    np.testing.assert_allclose(ours, EVAL_ARRAYS[f"{number:02}/{output}"], rtol=0, atol=1e-6)


def test_fused_crop_is_the_crop_of_the_decoded_image():
    spec = "decode_jpeg_and_inception_crop(area_min=40)"
    image = jpeg(ARRAYS["img"])
    for number in range(8):
        fused = apply_to_image(spec, image, (number, 0))
        separate = apply_to_image(spec.replace("decode_jpeg_and_", "decode|"), image, (number, 0))
        assert fused.shape == separate.shape
        # At the rim of the crop, chroma is interpolated without the pixels beyond it.
        inner = (slice(2, -2), slice(2, -2))
        np.testing.assert_allclose(fused[inner].astype(int), separate[inner].astype(int), atol=3)


def test_fused_crop_takes_other_formats_too():
    spec = "decode_jpeg_and_inception_crop(20)"
    pixels = ARRAYS["small"]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    from_png = apply_to_image(spec, buffer.getvalue(), (5, 6))
    from_pixels = apply_to_image(spec, pixels, (5, 6))
    separate = apply_to_image("inception_crop(20)", pixels, (5, 6))
    np.testing.assert_array_equal(from_png, from_pixels)
    np.testing.assert_array_equal(from_png, separate)


@pytest.mark.parametrize("spec", ["decode|resize(16)", "decode_jpeg_and_inception_crop(16)"])
def test_grey_and_cmyk_jpegs_become_rgb(spec):
    grey = np.full((30, 40), 90, np.uint8)
    assert apply_to_image(spec, jpeg(grey)).shape == (16, 16, 3)
    cmyk = io.BytesIO()
    Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(cmyk, "JPEG")
    red = apply_to_image(spec, cmyk.getvalue())
    assert red.shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP"])
def test_precise_decoding_reads_every_kind_of_file(kind):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (255, 0, 0)).save(file, kind)
    content = file.getvalue()
    np.testing.assert_array_equal(
        apply_to_image("decode(precise=True)", content), apply_to_image("decode", content)
    )


def test_overshoots_of_bicubic_interpolation_are_clipped():
    """Also in a size that leaves pixels over for a computation one by one."""
    edge = np.repeat(np.uint8([0, 0, 0, 255, 255, 255]), 3).reshape(1, 6, 3).repeat(6, 0)
    for side in (7, 11, 16):
        wide = apply_to_image(f"resize({side}, 'bicubic')", edge)[0, :, 0]
        small = apply_to_image(f"resize_small({side}, 'bicubic')", edge)[0, :, 0]
        for row in (wide, small):
            assert (np.diff(row.astype(int)) >= 0).all(), row
            assert (row[0], row[-1]) == (0, 255)


@pytest.mark.parametrize("method", geometry.MEANS)
def test_means_of_pixels_need_no_clipping(method):
    random = np.random.default_rng(0)
    for sides, antialias in itertools.product([(1, 1), (7, 90), (61, 33)], (False, True)):
        extremes = 255 * random.integers(0, 2, (*sides, 3), np.uint8)
        for size in (1, 13, 64):
            floats = tf.image.resize(extremes, (size, size), method=method, antialias=antialias)
            clipped = np.clip(floats, 0, 255).astype(np.uint8)
            found = geometry.resize(tf.constant(extremes), size, method, antialias)
            np.testing.assert_array_equal(found, clipped)


def test_a_central_square_may_be_a_share_of_the_shorter_side():
    image = np.arange(60 * 40).reshape(60, 40, 1).astype(np.int32)
    found = apply_to_image("central_crop(share=0.875)", image)
    np.testing.assert_array_equal(found, image[12:47, 2:37])
    np.testing.assert_array_equal(apply_to_image("central_crop", image), image[10:50])


def test_key_arguments_choose_the_fields():
    record = {"image": ARRAYS["small"], "other": ARRAYS["small"]}
    ours = apply("resize(4, key='other')|resize(6, inkey='image', outkey='thumb')", record)
    assert ours["image"].shape == (37, 53, 3)
    assert ours["other"].shape == (4, 4, 3)
    assert ours["thumb"].shape == (6, 6, 3)


def test_fields_are_kept_dropped_and_copied():
    record = {"image": ARRAYS["small"], "label": np.int64(3), "id": np.int64(9)}
    assert apply("keep('image', 'label')", record).keys() == {"image", "label"}
    assert apply("drop('id')|copy('label', 'y')", record).keys() == {"image", "label", "y"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resiz(3)", "preprocessing op 'resiz' is unknown; did you mean 'resize'"),
        ("resize(3", "is not understood"),
        ("resize 3", "is not understood"),
        ("resize(3) + flip_lr", "write name"),
        ("tf.resize(3)", "is not understood"),
        ("resize('big')", "size must be"),
        ("resize(2.5)", "size must be"),
        ("resize(True)", "size must be"),
        ("resize((2, 3, 4))", "size must be"),
        ("resize()", "missing a required argument: 'size'"),
        (
            "resize(3, antialiased=True)",
            "antialiased is no argument of it; did you mean 'antialias'",
        ),
        ("resize(3, antialias=1)", "antialias must be bool"),
        ("flip_lr(3)", "too many positional arguments"),
        ("resize(size)", "plain values"),
        ("resize(__import__('os'))", "plain values"),
        ("keep(3)", "keys must be str"),
    ],
)
def test_mistakes_in_the_string(spec, message):
    with pytest.raises(UserError, match=message):
        pp.parse(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("keep('imag')", "no field 'imag'; did you mean 'image'"),
        ("resize(3, key='picture')", "no field 'picture'"),
        ("resize(3, method='cubic')", "does not fit: Resize method is not implemented: cubic"),
        ("onehot(3)", "no field 'labels'; did you mean 'label'"),
        ("value_range(0, 1, 5, 5)", "does not fit: in_min=5 and in_max=5 are equal"),
        ("vgg_value_range(std=(0.2, 0.0, 0.2))", "does not fit: std=.*write numbers above 0"),
    ],
)
def test_strings_that_do_not_fit_the_records(spec, message):
    with pytest.raises(UserError, match=message):
        apply(spec, {"image": ARRAYS["small"], "label": np.int64(1)})


def test_a_field_that_was_dropped_too_early_is_named():
    record = {"image": ARRAYS["small"], "boxes": np.zeros((1, 4), np.float32)}
    message = r"'joint_crop\(2\)' needs the field 'box_\w+', which records do not have here"
    with pytest.raises(UserError, match=message):
        apply("joint_crop(2)", record | {"box_label": np.zeros(1, np.int32)})


@pytest.mark.parametrize("shape", [(1, 400), (400, 1), (1, 2_000), (1, 1)])
def test_sides_stay_between_one_pixel_and_what_memory_holds(shape):
    image = np.zeros((*shape, 3), np.uint8)
    ops = ("resize_long(36)", "resize_small(36)", "joint_resize_small(36)")
    for spec in (*ops, "joint_scale(1.9, 2.0, shorter=36)"):
        sides = apply_to_image(spec, image).shape[:2]
        assert min(sides) >= 1
        assert max(sides) <= 65_535
    assert max(apply_to_image("resize_long(36)", image).shape[:2]) == 36
