"""The size of every named model, to the unit."""

import dataclasses
import json
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from golden_trees import GOLDEN

from vit_jax import models
from vit_jax.models import listing

# 1000 classes, as google-research/vision_transformer publishes them.
PUBLISHED = {
    "mixer_b16": 59_880_472,
    "mixer_b32": 60_293_428,
    "mixer_l16": 208_196_168,
    "r26_b32": 101_383_976,
    "r26_s32": 36_431_912,
    "r50_b16": 98_659_112,
    "r50_l32": 328_994_856,
    "r_ti16": 6_337_704,
}

PUBLISHED["bit_v1_r50x1"] = 25_557_032  # torchvision's ResNet-50, whose norms are as large.

# google-research/vision_transformer's own table.
PUBLISHED_VIT = {
    "vit_ti16": 5_717_416,
    "vit_s16": 22_050_664,
    "vit_s32": 22_878_952,
    "vit_b8": 86_576_872,
    "vit_b16": 86_567_656,
    "vit_b32": 88_224_232,
    "vit_l16": 304_326_632,
    "vit_l32": 306_535_400,
    "vit_h14": 632_045_800,
}
PUBLISHED_MEAN = {
    "vit_s16": 22_049_896,
    "vit_s32": 22_878_184,
    "vit_b16": 86_566_120,
    "vit_b32": 88_222_696,
}

# The published LiT-B16B and LiT-L16L without their image towers, temperature and head.
BERT_BASE = 195_280_897 - (PUBLISHED_VIT["vit_b16"] - 1000 * 769) - 1 - 768 * 769
BERT_LARGE = 638_443_521 - (PUBLISHED_VIT["vit_l16"] - 1000 * 1025) - 1 - 1024 * 1025

ROWS = json.loads((GOLDEN / "big_vision" / "vit_variants.json").read_text())["rows"]
PLAIN_ROWS = {
    row["variant"].replace("-", ""): row
    for row in ROWS
    if (row["pool_type"], row["posemb"], row["rep_size"]) == ("gap", "learn", False)
}


BIT_STAGES = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}


def bit_count(stages, factor):
    """Convolutions without bias, two numbers a channel of every norm."""
    channels = 64 * factor
    total = 7 * 7 * 3 * channels
    for i, units in enumerate(stages):
        width = 64 * factor * 2**i
        total += channels * 4 * width  # projection
        for _ in range(units):
            convolutions = channels * width + 9 * width * width + width * 4 * width
            total += convolutions + 2 * (channels + width + width)
            channels = 4 * width
    return total + 2 * channels + 1000 * (channels + 1)


MIXER_SIZES = {"s": (512, 8), "b": (768, 12), "l": (1024, 24), "h": (1280, 32)}


def mixer_count(size, patch):
    width, depth = MIXER_SIZES[size]
    tokens, tokens_mlp = (224 // patch) ** 2, width // 2
    token_mixing = 2 * tokens * tokens_mlp + tokens + tokens_mlp
    channel_mixing = 8 * width * width + 5 * width
    blocks = depth * (token_mixing + channel_mixing + 4 * width)
    return 3 * patch**2 * width + width + blocks + 2 * width + 1000 * (width + 1)


def expected_count(name):
    """As published; else by arithmetic, for ViTs from big_vision's count at patch 16."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    family, _, rest = name.partition("_")
    return BY_ARITHMETIC[family](rest)


def bit_by_name(rest):
    depth, _, factor = rest.removeprefix("r").partition("x")
    return bit_count(BIT_STAGES[depth], int(factor))


def vit_by_name(rest):
    size = "so400m" if rest.startswith("so400m") else rest.rstrip("0123456789")
    patch, row = int(rest[len(size) :]), size_row(size)
    return vit_count(row, patch, 224 // patch) + 2 * row["width"]


def flexivit_by_name(rest):
    row = size_row(rest)
    return vit_count(row, patch=32, grid=7) + row["width"]


BY_ARITHMETIC = {
    "bit": bit_by_name,
    "mixer": lambda rest: mixer_count(rest[0], int(rest[1:])),
    "vit": vit_by_name,
    "flexivit": flexivit_by_name,
    "text": lambda rest: text_count(size_row(rest)),
    "bert": {"base": BERT_BASE, "large": BERT_LARGE}.__getitem__,
}


def size_row(size):
    exact = PLAIN_ROWS.get(size)
    return exact or next(row for name, row in PLAIN_ROWS.items() if name.lower() == size)


def vit_count(row, patch, grid):
    """Without a class token."""
    kernel = 3 * row["width"] * (patch**2 - 16**2)
    positions = row["width"] * (grid**2 - 14**2)
    return row["num_params"] + kernel + positions


def text_count(row):
    """64 tokens, no head: patches and their positions make way for the vocabulary and its own."""
    width = row["width"]
    image_side = 3 * width * 16**2 + width + 14**2 * width + 1000 * (width + 1)
    return row["num_params"] - image_side + 32_000 * width + 64 * width


NAMED = [name for name in models.names() if models.variants()[name].input_size]
# Deeper and wider ones are the same code as the smallest, and take long to count; ViTs differ from
# those with patches of 16 pixels in nothing else, as a test below says.
LIKE_OTHERS = re.compile(r"bit_r(101|152)x\d|vit_\w+?(8|14|28|30|32)")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.soak) if LIKE_OTHERS.fullmatch(name) else name
        for name in NAMED
    ],
)
def test_parameter_count(name):
    variant = models.variants()[name]
    model = models.build(name, num_classes=variant.num_classes)
    assert models.param_count(model, variant.input_size) == expected_count(name)


def test_counts_are_stored():
    for name in NAMED:
        assert listing.stored_counts()[name][0] == expected_count(name), name


def test_vits_of_a_size_differ_in_their_patches_alone():
    variants = models.variants()
    for name in NAMED:
        if name.startswith("vit_"):
            size, variant = name.rstrip("0123456789"), variants[name]
            like = variants[f"{size}16"]
            alike = dataclasses.replace(variant, fields={**variant.fields, "patch_size": 16})
            assert alike == like, name
            assert name == f"{size}{variant.fields['patch_size']}"


def test_arithmetic_meets_the_published_mixers():
    assert mixer_count("b", 16) == PUBLISHED["mixer_b16"]
    assert mixer_count("l", 16) == PUBLISHED["mixer_l16"]


def test_counting_needs_no_devices_of_the_mesh():
    """`plan` counts under the mesh of a machine that is not there."""
    mesh = jax.sharding.AbstractMesh(
        (4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    model = models.build("vit_ti16", num_classes=1000)
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules([("embed", "fsdp")]):
        assert models.param_count(model, 224) == PUBLISHED_VIT["vit_ti16"]
        assert models.flops(model, 224) > 0


def test_counts_published_for_vits():
    assert {name: expected_count(name) for name in PUBLISHED_VIT} == PUBLISHED_VIT
    for name, count in PUBLISHED_MEAN.items():
        model = models.build(name, num_classes=1000, pooling="mean")
        assert models.param_count(model, 224) == count


def test_flops_of_a_vit_are_its_matrix_products():
    width, depth, mlp, tokens = 192, 12, 768, 197
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp
    multiply_adds = depth * block + 196 * 16**2 * 3 * width + width * 1000
    for scan in (True, False):
        model = models.build("vit_ti16", num_classes=1000, scan=scan)
        assert models.flops(model, 224) == 2 * multiply_adds


def test_flops_of_a_convolution():
    model = models.build("bit_r50x1", stages=(1,))
    root = 112**2 * 7**2 * 3 * 64
    unit = 56**2 * (64 * 64 + 9 * 64 * 64 + 2 * 64 * 256)
    assert models.flops(model, 224) == 2 * (root + unit)


def test_listing_has_the_counts_and_costs():
    (row,) = listing.rows(["ViT-B/16"])
    assert row[:2] == ("ViT-B/16", PUBLISHED_VIT["vit_b16"])
    np.testing.assert_allclose(row.gflops, 35.1, atol=0.1)
    assert row.input_size == 224
    assert list(listing.rows(["vit"])) == []
    assert list(listing.rows(["vit_jax.models.vit:VisionTransformer"])) == []
    names = ["test_vit", "timm/test_vit.r160_in1k", "hf-hub:facebook/dinov2-small"]
    assert [row.input_size for row in listing.rows(names)] == [160, 160, 518]


def test_listing_everything_traces_nothing(monkeypatch):
    """Tracing every model takes minutes."""
    monkeypatch.setattr(listing, "build", lambda *_, **__: pytest.fail("a model was built"))
    assert {row.name for row in listing.rows()} == set(NAMED)
    monkeypatch.undo()
    found, left_out = listing.published()
    assert len(left_out) == 15  # As docs/coverage.md says.
    assert {model.name for model in found} <= listing.stored_counts().keys()
    assert listing.stored_counts().keys() | left_out == listing.sizes().keys()


TRACED = ("text_ti", "timm/test_vit.r160_in1k")  # Others are traced by tests above.


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in TRACED else pytest.mark.soak)
        for name in listing.stored_counts()
    ],
)
def test_stored_counts_are_those_of_the_models(name):
    """`scripts/model_counts.py` writes them anew."""
    expected = listing.traced_counts(name, listing.sizes()[name])
    assert tuple(listing.stored_counts()[name]) == expected


def test_a_new_model_is_one_new_file(tmp_path, monkeypatch):
    (tmp_path / "blur.py").write_text(
        "import flax.linen as nn\n"
        "from vit_jax.models import Variant\n"
        "from vit_jax.types import Features\n"
        "class Blur(nn.Module):\n"
        "    size: int = 2\n"
        "    def __call__(self, images, *, train=False):\n"
        "        return Features(grid=images, pooled=images.mean((1, 2)))\n"
        "VARIANTS = {'blur_4': Variant(Blur, {'size': 4})}\n"
    )
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    models.variants.cache_clear()
    try:
        assert models.build("Blur/4").size == 4
        shape = jax.eval_shape(
            models.build("blur4", num_classes=7).init, jax.random.key(0), np.ones((1, 8, 8, 3))
        )["params"]["head"]["kernel"].value.shape
        assert shape == (3, 7)
    finally:
        models.variants.cache_clear()
