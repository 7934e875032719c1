"""The backbones and position tables of DINO and DINOv2 equal those of the reference code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import self_supervised_golden as golden

from vit_jax.errors import UserError
from vit_jax.models.intermediate import last_layers
from vit_jax.models.layers import basic
from vit_jax.models.layers.resize import resize_position_table
from vit_jax.models.layers.transformer import Block, BlockSpec
from vit_jax.models.vit import VisionTransformer


def backbone(about, **fields):
    swiglu = about["ffn_layer"] == "swiglufused"
    width = about["embed_dim"]
    hidden = int(width * about["mlp_ratio"])
    side = about["img_size"] // about["patch_size"]
    return VisionTransformer(
        width=width,
        depth=about["depth"],
        num_heads=about["num_heads"],
        patch_size=about["patch_size"],
        mlp="swiglu" if swiglu else "gelu",
        mlp_dim=(int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden,
        activation="gelu",
        layer_scale=about["init_values"],
        qkv_bias=about.get("qkv_bias", True),
        proj_bias=about.get("proj_bias", True),
        mlp_bias=about.get("ffn_bias", True),
        num_registers=about["num_register_tokens"],
        position_grid=(side, side),
        position_resize_offset=about.get("interpolate_offset", 0.1),
        position_resize_antialias=about.get("interpolate_antialias", False),
        **fields,
    )


CASE = "swiglu_reg4_ls"


def test_the_backbone_of_dinov2():
    case = CASE
    about = golden.settings("dinov2_backbone")[case]
    found = golden.below(golden.arrays("dinov2_backbone"), f"{case}/")
    params = golden.below(found, "params/")
    # The reference keeps the positions of registers out of the table, and the class token's in it.
    tree = golden.vit(params, about["num_heads"])
    model = backbone(about)

    @jax.jit
    def run(tree, images, other, masks):
        token = params["mask_token"][0]
        masked = model.apply({"params": tree}, images, masked=(masks, token))
        layers = last_layers(model, tree, images, 2)
        return masked, model.apply({"params": tree}, other), layers

    images = [golden.images(found[name]) for name in ("images", "images_other_size")]
    masked, other, layers = run(tree, *images, found["masks"])
    golden.assert_near(masked.pooled, found["masked/x_norm_clstoken"])
    golden.assert_near(masked.registers, found["masked/x_norm_regtokens"])
    golden.assert_near(masked.tokens, found["masked/x_norm_patchtokens"])
    golden.assert_near(other.pooled, found["other_size/x_norm_clstoken"])
    golden.assert_near(other.tokens, found["other_size/x_norm_patchtokens"])
    for i in range(2):
        golden.assert_near(layers.patches[i], found[f"intermediate{i}/patch"])
        golden.assert_near(layers.cls[i], found[f"intermediate{i}/cls"])


def test_last_layers_do_not_depend_on_scan():
    about = golden.settings("dinov2_backbone")[CASE]
    found = golden.below(golden.arrays("dinov2_backbone"), f"{CASE}/")
    tree = golden.vit(golden.below(found, "params/"), about["num_heads"])
    blocks = tree.pop("blocks")
    for i in range(3):
        tree[f"blocks_{i}"] = jax.tree.map(lambda x, i=i: x[i], blocks)
    model = backbone(about, scan=False)
    layers = jax.jit(lambda x: last_layers(model, tree, x, 2))(golden.images(found["images"]))
    golden.assert_near(layers.patches[0], found["intermediate0/patch"])
    with pytest.raises(ValueError, match="4 blocks are wanted, of 3"):
        last_layers(model, tree, jnp.zeros((1, 32, 32, 3)), 4)


def test_positions_of_dino_for_crops_of_any_size():
    about = golden.settings("dino_pos_interpolation")
    found = golden.arrays("dino_pos_interpolation")
    old = (about["base_grid"],) * 2
    for rows, columns in about["sizes_rows_cols"]:
        table = resize_position_table(found["pos_embed"][:, 1:], old, (rows, columns), offset=0.1)
        golden.assert_near(table, found[f"rows{rows}_cols{columns}"][:, 1:])


def test_positions_of_dinov2_for_crops_of_any_size():
    found = golden.below(golden.arrays("dinov2_backbone"), "interp/")
    table = found.pop("pos_embed_grid6")[:, 1:]
    for name, expected in found.items():
        offset, antialias, rows, columns = (
            part.lstrip("abcdefghijklmnopqrstuvwxyz") for part in name.split("_")
        )
        grid, how = (int(rows), int(columns)), {"antialias": antialias == "1"}
        resized = resize_position_table(table, (6, 6), grid, offset=float(offset), **how)
        golden.assert_near(resized, expected[:, 1:])


def test_a_grid_of_positions_needs_a_table():
    with pytest.raises(UserError, match="position_grid is that of a learned table"):
        VisionTransformer(width=8, depth=1, num_heads=2, patch_size=4, position="sincos2d",
                          position_grid=(2, 2))  # fmt: skip


@pytest.mark.parametrize("case", ["ratio0.3", "ratio0.5"])
def test_stochastic_depth_of_dinov2_keeps_an_exact_share(case, monkeypatch):
    about = golden.settings("dinov2_stochastic_depth")[case]
    found = golden.below(golden.arrays("dinov2_stochastic_depth"), f"{case}/")
    params = golden.block(golden.below(found, "params/"), about["heads"])
    spec = BlockSpec.create(
        width=16, num_heads=about["heads"], mlp_dim=32, activation="gelu", layer_scale=1.0,
        drop_path_exact=True,
    )  # fmt: skip
    orders = iter([found["permutation_attn"], found["permutation_mlp"]])
    monkeypatch.setattr(basic.jax.random, "permutation", lambda key, n: next(orders))
    rngs = {"dropout": jax.random.key(0)}
    for rate, name in ((None, "out_eval"), (about["drop_ratio"], "out")):
        block = Block(spec, train=rate is not None)
        run = jax.jit(
            lambda x, b=block, r=rate: b.apply({"params": params}, x, r, None, None, rngs=rngs)
        )
        out, _ = run(found["x"])
        golden.assert_near(out, found[name])
    assert next(orders, None) is None


def test_low_rates_of_stochastic_depth_are_chances():
    x, key = jnp.ones((40, 1)), jax.random.key(3)
    low, chance = (jax.jit(f)(x, 0.1, key) for f in (basic.drop_exact_share, basic.drop_path))
    np.testing.assert_array_equal(low, chance)
    exact = jax.jit(basic.drop_exact_share)(jnp.ones((10, 1)), 0.3, key)
    assert sorted(np.asarray(exact)[:, 0]) == pytest.approx([0] * 3 + [10 / 7] * 7)
