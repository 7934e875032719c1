"""Records tests/golden/timm_tiny: a tiny model of each kind of timm's, with its outputs.

    python tests/interop/record_timm.py [NAME ...]

Each is made by timm's own factory, narrower and with two blocks, and all other options kept.
Weights are random and nowhere zero, so that nothing can hide. Needs the extras `interop`
and `test`.
"""

import functools
import json
import pathlib
import shutil
import sys

import numpy as np
import torch
from random_weights import draw
from real_packages import import_packages
from safetensors.torch import save_file

from vit_jax.models import timm_names

timm, _ = import_packages()

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "timm_tiny"

PATCH = {"img_size": 16, "patch_size": 4}
VIT = {**PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
MINI = {**VIT, "embed_dim": 8, "mlp_ratio": 1.0}
NAMES = {
    **dict.fromkeys(
        (
            *("vit_base_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_rpn_224"),
            *("vit_base_patch16_clip_quickgelu_224", "vit_betwixt_patch16_reg1_gap_256"),
            *(
                "vit_base_patch16_siglip_224",
                "aimv2_large_patch14_224",
                "vit_base_patch16_rope_224",
            ),
            *("beit_base_patch16_224", "eva02_base_patch14_224", "eva_large_patch14_196"),
            *(
                "eva02_base_patch16_clip_224",
                "beit3_base_patch16_224",
                "vit_pe_core_base_patch16_224",
            ),
            *("vit_so150m2_patch16_reg1_gap_256", "vit_base_patch16_dinov3_qkvb", "test_vit3"),
            *("vit_pe_spatial_base_patch16_512", "deit_base_distilled_patch16_224"),
            *("vit_base_patch16_radio_v3", "vit_giant_patch14_dinov2", "eva_giant_patch14_224"),
            *("vit_base_patch16_rope_mixed_ape_224", "vit_base_patch16_rope_reg1_gap_256"),
            *("vit_relpos_base_patch16_224", "vit_srelpos_medium_patch16_224"),
            *("vit_relpos_base_patch16_clsgap_224", "vit_pwee_patch16_reg1_gap_256"),
            "eva02_enormous_patch14_clip_224",
        ),
        VIT,
    ),
    "vit_base_patch16_sapiens2": {**VIT, "num_kv_heads": 1},
    **dict.fromkeys(("vit_dwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"), MINI),
    "vit_large_patch16_sapiens2": {**MINI, "num_kv_heads": [2, 1]},
}
NAFLEX = {
    "naflexvit_base_patch16_siglip": {**VIT, "pos_embed_grid_size": [4, 4]},
    "naflexvit_base_patch16_parfac_gap": {**VIT, "pos_embed_grid_size": [4, 4]},
    # Positions of another grid than the images', which these models resize in ways of their own.
    "naflexvit_base_patch16_radio_v3": {**MINI, "pos_embed_grid_size": [7, 6]},
    "naflexvit_giant_patch16_radio_v3": {**MINI, "pos_embed_grid_size": [7, 6]},
}


SMALL = {"vit_base_mci_224"} | {
    n for n, given in (NAMES | NAFLEX).items() if given["embed_dim"] == MINI["embed_dim"]
}


def record(folder, model, side, config=None):
    if sys.argv[1:] and folder.name not in sys.argv[1:]:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if folder.name in SMALL:
        images = (images[:1] * 8).round() / 8
    inputs = {"images": images.numpy().transpose(0, 2, 3, 1)}
    arrays = {"outputs": model(images).numpy()}
    if folder.name in SMALL or side != VIT["img_size"]:
        arrays |= inputs
    else:  # Most models see the same images, which one file for all of them holds.
        np.savez_compressed(GOLDEN / "images.npz", **inputs)
    np.savez_compressed(folder / "io.npz", **arrays)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"timm": timm.__version__})
    if config:
        (folder / "config.json").write_text(json.dumps(config) + "\n")


def config_of(name, arguments):
    """Returns the config that timm writes beside a model's weights."""
    size = {"pretrained_cfg": {"input_size": [3, 16, 16]}}
    return {"architecture": name, "num_classes": 3, **size, "model_args": arguments}


def record_conv_stem():
    """Records MobileCLIP's stem, with statistics of its batch norms that are not the first ones."""
    stems = timm.models.vision_transformer_hybrid
    stem = stems.ConvStem(
        channels=(6, 6, 8),
        stride=(4, 2, 2),
        kernel_size=(4, 2, 2),
        padding=0,
        act_layer=torch.nn.GELU,
    )
    embed = functools.partial(timm.layers.HybridEmbed, backbone=stem, proj=False)
    sizes = {"embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1.0, "img_size": 32}
    make = timm.models.vision_transformer.VisionTransformer
    more = {"num_classes": 3, "patch_size": 1, "no_embed_class": True}
    model = draw(make(embed_layer=embed, **sizes, **more))
    # The stored model has statistics from a generator of their own, and not those of `draw`.
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(2)) + 0.5)
    record(GOLDEN / "vit_base_mci_224", model, 32, config_of("vit_base_mci_224", sizes))


def main():
    for name, arguments in NAMES.items():
        model = draw(timm.create_model(name, num_classes=3, **arguments))
        record(GOLDEN / name, model, 16, config_of(name, arguments))
    for name, sizes in NAFLEX.items():
        arguments = {key: value for key, value in sizes.items() if key != "img_size"}
        given = {**timm_names.table()[name]["args"], **arguments}
        if "act_layer" in given:
            given["act_layer"] = "gelu_tanh"  # timm takes this word, not the layer's name.
        cfg = timm.models.naflexvit.NaFlexVitCfg(**given)
        model = draw(timm.models.naflexvit.NaFlexVit(cfg, num_classes=3))
        record(GOLDEN / name, model, 16, config_of(name, arguments))
    mixers, sizes = timm.models.mlp_mixer, {**PATCH, "embed_dim": 16, "num_blocks": 2}
    layers = {"block_layer": mixers.ResBlock, "norm_layer": mixers.Affine, "mlp_ratio": 1.5}
    for name, more in (("mixer_b16_224", {}), ("resmlp_12_224", layers)):
        model = draw(mixers.MlpMixer(num_classes=3, **sizes, **more))
        told = {k: v for k, v in more.items() if k == "mlp_ratio"}
        record(GOLDEN / name, model, 16, config_of(name, {**sizes, **told}))
    record_conv_stem()
    # The factories of ResNets and hybrids make no tiny models.
    same = functools.partial(timm.layers.StdConv2dSame, eps=1e-8)
    fixed = functools.partial(timm.layers.StdConv2d, eps=1e-8)
    net = functools.partial(timm.models.resnetv2.ResNetV2, [1], (256,), width_factor=0.5)
    bit = net(num_classes=3, stem_type="fixed", conv_layer=fixed)
    record(GOLDEN / "bit", draw(bit), 32)
    stem = net(
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same",
        conv_layer=same,
    )
    embed = functools.partial(timm.layers.HybridEmbed, backbone=stem, patch_size=1)
    small = {**VIT, "img_size": 32, "patch_size": 1, "num_classes": 3}
    hybrid = timm.models.vision_transformer.VisionTransformer(embed_layer=embed, **small)
    record(GOLDEN / "hybrid", draw(hybrid), 32)


if __name__ == "__main__":
    with torch.no_grad():
        main()
