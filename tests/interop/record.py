"""Records tests/golden/interop: tiny models of timm and transformers, with their outputs.

    python tests/interop/record.py

Weights are random and nowhere zero, so that nothing can hide. Needs the extra `interop`.
"""

import argparse
import functools
import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import torch
from real_packages import import_packages
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "checkpoints"))
import bit_file  # found through the line before

timm, transformers = import_packages()

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "interop"

SIZE = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
TANH = {"act_layer": "gelu_tanh", "mlp_ratio": 1.5, "num_classes": 3}
MEAN = {"global_pool": "avg", "class_token": False, "fc_norm": False}

# Arguments of timm beside the fields of our model.
TIMM = {
    "timm_token": ({}, {}),
    "timm_token_no_embed_class": ({"no_embed_class": True}, {"class_token_position": False}),
    "timm_mean": (MEAN, {"pooling": "mean"}),
    "timm_map": ({"global_pool": "map", "class_token": False}, {"pooling": "map"}),
    "timm_registers_scale_qk_norm": (
        {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1, "qk_norm": True},
        {
            "num_registers": 2,
            "class_token_position": False,
            "layer_scale": 0.1,
            "qk_norm": True,
        },
    ),
    "timm_swiglu": (
        {"mlp_layer": timm.layers.SwiGLU, "act_layer": "silu"},
        {"mlp": "swiglu"},
    ),
}


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.bias", "k_norm.bias")):
            torch.nn.init.zeros_(parameter)  # ours has none
            continue
        value = 0.3 * torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = value + centre
    return model.eval()


def images(channels=3, size=(8, 12)):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, channels, *size, generator=generator) * 2 - 1


def record(name, fields, inputs, logits):
    arrays = {"images": inputs.numpy().transpose(0, 2, 3, 1), "logits": logits.numpy()}
    np.savez_compressed(GOLDEN / f"{name}.io.npz", **arrays)
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    text = json.dumps({"fields": fields, "versions": versions}, indent=1)
    (GOLDEN / f"{name}.json").write_text(text + "\n")


def record_timm():
    ours = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
    for name, (arguments, fields) in TIMM.items():
        model = timm.create_model("vit_base_patch16_224", **{**SIZE, **TANH, **arguments})
        model = randomise(model)
        save_file(model.state_dict(), GOLDEN / f"{name}.safetensors")
        record(name, {**ours, "num_classes": 3, **fields}, images(), model(images()))
    mixer = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_blocks": 2}
    ratios = {"mlp_ratio": (0.5, 1.5), "act_layer": timm.layers.GELUTanh, "num_classes": 3}
    model = randomise(timm.models.mlp_mixer.MlpMixer(**mixer, **ratios))
    save_file(model.state_dict(), GOLDEN / "timm_mixer.safetensors")
    square = images(size=(8, 8))
    dims = {"tokens_mlp_dim": 8, "channels_mlp_dim": 24}
    fields = {"patch_size": 4, "width": 16, "depth": 2, "num_classes": 3, **dims}
    record("timm_mixer", fields, square, model(square))


def record_transformers():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=[8, 12],
        patch_size=4,
        num_labels=3,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        pooler_output_size=16,
    )
    ours = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
    model = randomise(transformers.ViTForImageClassification(config))
    model.save_pretrained(GOLDEN / "hf_classifier")
    record("hf_classifier", {**ours, "num_classes": 3}, images(), model(images()).logits)
    model = randomise(transformers.ViTModel(config, add_pooling_layer=True))
    model.save_pretrained(GOLDEN / "hf_pooler", max_shard_size="8KB")
    record("hf_pooler", ours, images(), model(images()).last_hidden_state[:, 0])


def record_bit():
    """timm's logits of a BiT that it read from the published names."""
    model = timm.models.resnetv2.ResNetV2(
        list(bit_file.STAGES),
        num_classes=bit_file.CLASSES,
        width_factor=bit_file.WIDTH / 64,
        stem_type="fixed",
        conv_layer=functools.partial(timm.layers.StdConv2d, eps=1e-8),
    )
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, **bit_file.published())
        file.flush()
        model.load_pretrained(file.name)
    logits = model.eval()(torch.from_numpy(bit_file.images().transpose(0, 3, 1, 2).copy()))
    np.savez_compressed(GOLDEN / "bit.npz", logits=logits.numpy())


def record_positions():
    """timm's resampling of positions: bicubic and bilinear, antialiased."""
    table = torch.randn(1, 4 * 6, 5, generator=torch.Generator().manual_seed(2))
    arrays = {"table": table.numpy()}
    for mode in ("bicubic", "bilinear"):
        for new in ((7, 3), (3, 4), (8, 12)):
            resampled = timm.layers.resample_abs_pos_embed(
                table, new, old_size=(4, 6), num_prefix_tokens=0, interpolation=mode
            )
            arrays[f"{mode}/{new[0]}x{new[1]}"] = resampled.numpy()
    np.savez_compressed(GOLDEN / "timm_positions.npz", **arrays)


def record_torch_files():
    """The arrays of `timm_token` in the files that torch writes, and tensors that are not read."""
    state = load_file(GOLDEN / "timm_token.safetensors")
    parameters = [torch.nn.Parameter(x.clone()) for x in state.values()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    arguments = argparse.Namespace(lr=1e-3, output=pathlib.PurePosixPath("out"), betas=(0.9, 0.95))
    whole = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 3, "args": arguments}
    torch.save(whole, GOLDEN / "torch_training.pth")
    backwards = {name: x.T.contiguous().T if x.ndim == 2 else x for name, x in state.items()}
    base = torch.cat([x.flatten() for x in state.values() if x.ndim == 1])
    start = 0
    for name, x in state.items():
        if x.ndim == 1:
            backwards[name] = base[start : start + len(x)]
            start += len(x)
    torch.save(backwards, GOLDEN / "torch_views.pth")
    half = {name: torch.nn.Parameter(x.bfloat16()) for name, x in state.items()}
    torch.save(half, GOLDEN / "torch_old.bin", _use_new_zipfile_serialization=False)
    odd = {
        "sparse": torch.eye(4).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
        "expanded": torch.zeros(1).expand(1_000_000, 2_000_000),
        "float8": torch.eye(4).to(torch.float8_e4m3fn),
    }
    for name, x in odd.items():
        torch.save({"head.weight": x}, GOLDEN / f"torch_{name}.pth")


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir(parents=True)
    with torch.no_grad():
        record_timm()
        record_transformers()
        record_bit()
        record_positions()
    record_torch_files()
