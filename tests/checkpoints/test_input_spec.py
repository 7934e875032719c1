"""The files beside a checkpoint tell how to prepare images, for every codebase that tells."""

import json

import pytest

from vit_jax.checkpoints import input_spec
from vit_jax.checkpoints.input_spec import InputSpec
from vit_jax.errors import UserError

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
MEAN = pytest.approx((123.675, 116.28, 103.53))
STD = pytest.approx((58.395, 57.12, 57.375))

# As the published repositories have them; keys that concern nothing here are left out.
VIT = {
    "do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "size": 224,
}  # fmt: skip
DINO = {
    **IMAGENET, "image_processor_type": "BitImageProcessor", "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}, "resample": 3,
    "do_rescale": True, "rescale_factor": 1 / 255,
}  # fmt: skip
DEIT = {
    **IMAGENET, "feature_extractor_type": "DeiTFeatureExtractor", "do_center_crop": True,
    "crop_size": 224, "size": 256, "resample": 3,
}  # fmt: skip
CLIP = {
    "feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "crop_size": 224,
    "size": 224, "resample": 3, "image_mean": [0.48], "image_std": [0.27],
}  # fmt: skip
CONVNEXT = {
    **IMAGENET, "image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875,
    "size": {"shortest_edge": 224}, "resample": 3,
}  # fmt: skip


def transformers(folder, told):
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return input_spec.read(folder)


@pytest.mark.parametrize(
    ("told", "geometry"),
    [
        (VIT, ((224, 224), 1.0, False, "bilinear")),
        (DINO, ((224, 224), 0.875, True, "bicubic")),
        (DEIT, ((224, 224), 0.875, False, "bicubic")),
        (CLIP, ((224, 224), 1.0, True, "bicubic")),
        (CONVNEXT, ((224, 224), 0.875, True, "bicubic")),
        ({**CONVNEXT, "size": {"shortest_edge": 384}}, ((384, 384), 1.0, False, "bicubic")),
        ({**VIT, "size": {"height": 192, "width": 256}}, ((192, 256), 1.0, False, "bilinear")),
        ({**VIT, "do_resize": False}, (None, 1.0, False, "bilinear")),
    ],
)
def test_geometry_of_transformers(tmp_path, told, geometry):
    """Size, crop, whether the aspect ratio is kept, and interpolation."""
    spec = transformers(tmp_path, told)
    assert (spec.size, spec.crop, spec.keeps_aspect, spec.interpolation) == geometry


def test_statistics_of_transformers_are_of_pixels_up_to_255(tmp_path):
    spec = transformers(tmp_path, DINO)
    assert (spec.mean, spec.std) == (MEAN, STD)
    spec = transformers(tmp_path, {**VIT, "rescale_factor": 1 / 127.5, "image_mean": 1.0})
    assert (spec.mean, spec.std) == (pytest.approx((127.5,)), pytest.approx((63.75,) * 3))
    spec = transformers(tmp_path, {**VIT, "do_normalize": False})
    assert (spec.mean, spec.std) == ((0.0,), pytest.approx((255.0,)))
    spec = transformers(tmp_path, {**VIT, "do_rescale": False, "do_normalize": False})
    assert (spec.mean, spec.std) == ((0.0,), (1.0,))


TIMM = {
    "input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
}  # fmt: skip


def timm(folder, told):
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": told}))
    (folder / "model.safetensors").write_bytes(b"")
    return input_spec.read(folder / "model.safetensors")


def test_a_timm_file_is_told_by_the_config_beside_it(tmp_path):
    spec = timm(tmp_path, TIMM)
    assert (spec.mean, spec.std) == (MEAN, STD)
    assert spec == InputSpec(
        spec.mean, spec.std, (224, 224), 0.9, interpolation="bicubic", rounds_to_even=True
    )
    assert not timm(tmp_path, {**TIMM, "crop_mode": "squash"}).keeps_aspect
    assert timm(tmp_path, {"input_size": [3, 64, 32]}).crop == 0.875
    assert input_spec.read(tmp_path).rounds_to_even
    assert input_spec.read(tmp_path / "other.npz") is None


def test_a_run_tells_its_statistics_wherever_the_checkpoint_lies(tmp_path):
    stored = {"config": {"task": {"mean": [10.0], "std": [20.0, 30.0, 40.0]}}, "data_info": {}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    step = tmp_path / "checkpoints" / "7"
    step.mkdir(parents=True)
    for path in (tmp_path, step.parent, step):
        spec = input_spec.read(str(path))
        assert (spec.mean, spec.std) == ((10.0,), (20.0, 30.0, 40.0))
    (tmp_path / "config.json").write_text(json.dumps({**stored, "config": {"task": {}}}))
    assert input_spec.read(tmp_path) == InputSpec()


def test_a_folder_that_tells_nothing(tmp_path):
    assert input_spec.read(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert input_spec.read(tmp_path) is None
    assert input_spec.read("https://host/model.safetensors") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_mean": "grey"},
        {"image_mean": []},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": [True, False, True]},
        {"image_mean": [1e400]},
        {"rescale_factor": 0},
        {"rescale_factor": None},
        {"rescale_factor": float("nan")},
        {"rescale_factor": 1e-320},
        {"image_std": [1e308] * 3},
        {"resample": 9},
        {"size": -4},
        {"size": 1e9},
        {"size": {"longest_edge": 4}},
        {"do_center_crop": True},
        {"do_center_crop": True, "crop_size": 300},
        {"crop_pct": -1},
    ],
)
def test_what_cannot_be_understood_is_one_line(tmp_path, wrong):
    with pytest.raises(UserError, match="does not tell how to prepare images") as error:
        transformers(tmp_path, {**VIT, **wrong})
    assert "preprocessor_config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_names_of_classes_are_read_from_sections_alone(tmp_path):
    for stored, names in (
        ({"data_info": {"class_names": ["a", "b"]}, "config": {"task": {}}}, ("a", "b")),
        ({"data_info": [], "config": {"task": {"class_names": ["c"]}}}, ("c",)),
        ({"data_info": 5, "config": [1], "id2label": {"0": "d"}}, ("d",)),
        ({"data_info": {"class_names": "ab"}, "config": {"task": 3}}, ()),
    ):
        (tmp_path / "config.json").write_text(json.dumps(stored))
        assert input_spec.class_names(tmp_path) == names
        assert not input_spec.has_independent_classes(tmp_path)


def test_a_processor_of_images_and_texts_tells_what_its_part_for_images_does(tmp_path):
    expected = transformers(tmp_path, CLIP)
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "processor_config.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": CLIP}))
    assert input_spec.read(tmp_path) == expected
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert input_spec.read(tmp_path) is None


@pytest.mark.parametrize("told", [[], None, {"input_size": 3}, {**TIMM, "crop_mode": "border"}])
def test_a_broken_pretrained_cfg_is_one_line(tmp_path, told):
    with pytest.raises(UserError, match=r"config\.json does not tell how to prepare images"):
        timm(tmp_path, told)


def test_equal_statistics_may_differ_by_rounding_and_in_length():
    spec = InputSpec(mean=(127.5,), std=(63.75,))
    assert spec.has_statistics((127.5, 127.51, 127.5), (63.75,))
    assert not spec.has_statistics((127.5, 120.0, 127.5), (63.75,))
    assert not spec.has_statistics((127.5,), (64.5,))
