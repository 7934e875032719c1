"""BiT's published files: names, logits as timm computes them, and the way back."""

import bit_file
import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, assert_close

from vit_jax import checkpoints, models
from vit_jax.checkpoints import array_files
from vit_jax.errors import UserError
from vit_jax.inference import convert


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("bit") / "BiT.npz"
    np.savez(path, **bit_file.published())
    return path


def build(num_classes=bit_file.CLASSES):
    return models.build(
        "bit_r50x1",
        stages=bit_file.STAGES,
        width_factor=bit_file.WIDTH / 64,
        num_classes=num_classes,
    )


def test_logits_are_timm_s(published):
    params, report = checkpoints.load_with_report(published, build())
    assert len(report.loaded) == len(bit_file.published())
    assert str(report).count("\n") == 0  # nothing resized, initialised or ignored
    logits = jax.jit(build().apply)({"params": params}, bit_file.images())
    with np.load(GOLDEN / "interop" / "bit.npz") as stored:
        assert_close(logits, stored["logits"])


def test_other_namings_give_the_same_parameters(published, tmp_path):
    expected = checkpoints.load(published, build())
    arrays = bit_file.published()
    numbered = {n.replace("/b/standardized_conv2d/", "/b/standardized_conv2d_3/"): x
                for n, x in arrays.items()}  # fmt: skip
    assert numbered.keys() != arrays.keys()
    extra = {"opt/state/step": np.ones(3)}
    for other in (numbered, bit_file.in_big_vision_names(arrays) | extra):
        np.savez(tmp_path / "c.npz", **other)
        params, report = checkpoints.load_with_report(tmp_path / "c.npz", build())
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        assert len(report.ignored) == len(other.keys() & extra.keys())


def test_files_come_back_bit_for_bit_without_a_word_about_the_model(published, tmp_path):
    convert.run(str(published), str(tmp_path / "own"), "orbax")
    text = convert.run(str(tmp_path / "own"), str(tmp_path / "c.npz"), "npz")
    actual, expected = (
        array_files.read_arrays(tmp_path / "c.npz"),
        array_files.read_arrays(published),
    )
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)
    assert "ResNetV2(layers=[2, 1], width_factor=0.5, num_classes=3" in text


def test_a_new_head_and_what_does_not_fit(published, tmp_path):
    params, report = checkpoints.load_with_report(published, build(num_classes=5))
    assert not np.any(params["head"]["kernel"])
    assert any("3 classes, the model 5" in line for line in report.ignored)
    with pytest.raises(UserError, match="stage2/unit2"):
        checkpoints.load(published, models.build("bit_r50x1", stages=(2, 2), width_factor=0.5))
    np.savez(tmp_path / "c.npz", **bit_file.published(), **{"resnet/block1/extra": np.ones(2)})
    with pytest.raises(UserError, match="resnet/block1/extra"):
        checkpoints.load(tmp_path / "c.npz", build())
