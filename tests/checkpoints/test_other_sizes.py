"""Positions at another size of images, as each library resizes its own (record_sizes.py)."""

import golden_cases
import jax
import numpy as np
import pytest

from vit_jax.checkpoints import loading
from vit_jax.checkpoints.fit import surgery
from vit_jax.checkpoints.fit.inference import infer_model

GOLDEN = golden_cases.GOLDEN
OUTPUTS = dict(np.load(GOLDEN / "interop" / "other_sizes.npz"))
# One case of each way to resize is in the default suite.
DEFAULT = ("beit", "beit_base_patch16_224", "naflexvit_base_patch16_radio_v3", "siglip2_naflex")
CASES = [
    case if case in DEFAULT else pytest.param(case, marks=pytest.mark.soak) for case in OUTPUTS
]


@pytest.mark.parametrize("case", CASES)
def test_a_model_at_another_size_computes_what_the_real_library_computed(case):
    if (GOLDEN / "hf_tiny" / case).exists():
        folder, images = GOLDEN / "hf_tiny" / case, np.load(GOLDEN / "hf_tiny" / "images.npz")
    else:
        folder, images = GOLDEN / "timm_tiny" / case, golden_cases.load_timm(case)
    images = images["images"]
    images = np.concatenate([images, images[:, :8]], axis=1)
    weights = loading.read_weights(folder)
    model = infer_model(weights)
    params, report = loading.fit(weights, model, case, image_size=images.shape[1:3])
    assert report.resized
    with jax.default_matmul_precision("highest"):
        out = jax.jit(model.apply)({"params": params}, images)
    expected = OUTPUTS[case]
    actual = getattr(out, "pooled", out)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("how", ["geometric", "torch_bilinear"])
def test_biases_of_offsets_keep_what_follows_them(how):
    table = np.concatenate([np.ones((25, 2)), [[2, 3], [4, 5], [6, 7]]])
    resized = surgery.resize_bias(table, (3, 3), (2, 5), how)
    assert resized.shape == (3 * 9 + 3, 2)
    np.testing.assert_allclose(resized[:-3], 1)
    np.testing.assert_array_equal(resized[-3:], table[-3:])


def test_without_a_size_the_tables_of_the_file_stay():
    weights = loading.read_weights(GOLDEN / "hf_tiny" / "beit")
    params, report = loading.fit(weights, infer_model(weights), "beit")
    assert not report.resized
    stored = weights.arrays["backbone/blocks_0/attn/position_bias/table"]
    np.testing.assert_array_equal(
        params["backbone"]["blocks"]["attn"]["position_bias"]["table"][0], stored
    )
