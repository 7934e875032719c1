"""Records tests/golden/hf_tiny: tiny models of transformers and open_clip, with their outputs.

    python tests/interop/record_hf.py

Two blocks of width 32 with random weights that are nowhere zero, so that nothing can hide; all
other settings are those of the published files. Needs torch, transformers and open_clip_torch.
"""

import json
import pathlib
import re
import shutil
import sys

import numpy as np
import open_clip
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "hf_tiny"
SIDE = 16

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": 4,
}
DINO = {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
TINY = SMALL | {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
LABELS = {"num_labels": 3}
DECODER = {
    "mask_ratio": 0.0,
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 16,
}
BEIT = SMALL | {"use_relative_position_bias": True, "use_mean_pooling": True} | LABELS
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 8,
}
TOWERS = {"vision_config": SMALL, "text_config": TEXT | {"projection_size": 32}}
CLIP_TEXT = TEXT | {"bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 0}
NAFLEX = {k: v for k, v in SMALL.items() if k != "image_size"} | {"num_patches": 16}

# The name of a case: its class, its config, and the config's arguments.
CASES = {
    "vit": ("ViTForImageClassification", "ViTConfig", SMALL | LABELS),
    "deit": ("DeiTForImageClassification", "DeiTConfig", SMALL | LABELS),
    "deit_distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", SMALL | LABELS),
    "mae": ("ViTMAEModel", "ViTMAEConfig", SMALL | DECODER),
    "mae_whole": ("ViTMAEForPreTraining", "ViTMAEConfig", SMALL | DECODER),
    "msn": ("ViTMSNModel", "ViTMSNConfig", SMALL),
    "ijepa": ("IJepaModel", "IJepaConfig", SMALL),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO),
    "dinov2_giant": ("Dinov2Model", "Dinov2Config", DINO | {"use_swiglu_ffn": True}),
    "dinov2_classifier": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        DINO | LABELS | {"hidden_size": 8, "num_hidden_layers": 1, "mlp_ratio": 1},
    ),
    "dinov2_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", SMALL | {"num_register_tokens": 4}),
    "dinov3_gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        SMALL | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "siglip": ("SiglipModel", "SiglipConfig", TOWERS),
    "siglip_vision": ("SiglipVisionModel", "SiglipVisionConfig", SMALL),
    "siglip2_naflex": ("Siglip2VisionModel", "Siglip2VisionConfig", NAFLEX),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"vision_config": SMALL, "text_config": CLIP_TEXT, "projection_dim": 24},
    ),
    "clip_vision": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        SMALL | {"projection_dim": 24},
    ),
    "owlvit": ("OwlViTForObjectDetection", "OwlViTConfig", TOWERS | {"projection_dim": 24}),
    "owlv2": ("Owlv2ForObjectDetection", "Owlv2Config", TOWERS | {"projection_dim": 24}),
    "beit": ("BeitForImageClassification", "BeitConfig", BEIT),
    "data2vec": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", BEIT),
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", SMALL | {"use_head": False}),
    "aimv2_head": ("Aimv2VisionModel", "Aimv2VisionConfig", TINY | {"use_head": True}),
}


def draw(model):
    """Draws every parameter anew, at scales that keep activations near one.

    All are rounded to half precision, in which the files hold them.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if re.search(r"lambda_?[12]$", name):
            parameter.copy_(0.5 + 0.2 * noise)
        elif parameter.ndim == 1 and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim <= 1:
            parameter.copy_(0.2 * noise)
        elif name.endswith("weight") and "embedding" not in name:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.5 * noise)
        parameter.copy_(parameter.half())
    return model.eval()


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, SIDE, SIDE, generator=generator)


def output_of(model, x):
    """Returns logits, image embeddings, or else the pooled or averaged tokens."""
    name = type(model).__name__
    if name in ("CLIPModel", "SiglipModel"):
        out = model.get_image_features(pixel_values=x)
        return getattr(out, "pooler_output", out)
    if name == "Siglip2VisionModel":
        patches = x.reshape(2, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, -1)
        mask, shapes = torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4]] * 2)
        return model(patches, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output
    if name.startswith("Owl"):
        part = getattr(model, name.partition("For")[0].lower())
        return part.vision_model(x).pooler_output
    model = model.vit if name == "ViTMAEForPreTraining" else model
    out = model(x)
    found = [getattr(out, key, None) for key in ("logits", "image_embeds")]
    if name.startswith(("Siglip", "Aimv2")):
        found.append(out.pooler_output)
    tokens = out.last_hidden_state if hasattr(out, "last_hidden_state") else None
    if tokens is not None:
        found.append(tokens.mean(1) if name.startswith(("IJepa", "Aimv2")) else tokens[:, 0])
    return next(x for x in found if x is not None)


def photo():
    """Returns an image of smooth colors that is neither square nor of the models' size."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((41, 29), Image.Resampling.BICUBIC)


# The image processors of some cases, with the geometry of the published ones at a smaller size.
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {
    "dinov2": (
        "BitImageProcessorPil",
        {"size": {"shortest_edge": 18}, "crop_size": {"height": SIDE, "width": SIDE}} | IMAGENET,
    ),
    "siglip_vision": ("SiglipImageProcessorPil", {"size": {"height": SIDE, "width": SIDE}}),
    "clip_vision": (
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
    ),
}


def record(name):
    kind, config, arguments = CASES[name]
    model = draw(getattr(transformers, kind)(getattr(transformers, config)(**arguments)))
    arrays = {"output": output_of(model, images()).numpy()}
    if name in PROCESSORS:
        kind, arguments = PROCESSORS[name]
        processor = getattr(transformers, kind)(**arguments)
        processor.save_pretrained(GOLDEN / name)
        pixels = processor(photo(), return_tensors="pt")["pixel_values"]
        # Features are what comes before a projection.
        tower = getattr(model, "vision_model", model)
        out = tower(pixels)
        arrays["photo"] = (
            out.pooler_output if name != "dinov2" else output_of(model, pixels)
        ).numpy()
    model.half().save_pretrained(GOLDEN / name)
    np.savez_compressed(GOLDEN / name / "io.npz", **arrays)


VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 4, "image_size": SIDE}
OPEN_CLIP = {
    "open_clip": {"vision_cfg": VISION | {"mlp_ratio": 1.5}},
    "open_clip_clipa": {
        "vision_cfg": VISION
        | {"layers": 1, "width": 8, "head_width": 4, "mlp_ratio": 1.0, "no_ln_pre": True}
        | {"pool_type": "avg", "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}
        | {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
    },
}


def record_open_clip(name):
    """Records open_clip's CLIP as a folder of the hub has it."""
    text = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "text_cfg": text} | OPEN_CLIP[name]
    model = draw(open_clip.model.CLIP(**config))
    folder = GOLDEN / name
    folder.mkdir()
    arrays = {"output": model.encode_image(images()).numpy()}
    stored = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(stored, indent=2))
    state = {name: x.half().contiguous() for name, x in model.state_dict().items()}
    if folder.name != "open_clip":
        state = {name: x for name, x in state.items() if name.startswith("visual.")}
    save_file(state, folder / "open_clip_model.safetensors")
    np.savez_compressed(folder / "io.npz", **arrays)


if __name__ == "__main__":
    names = sys.argv[1:] or [*CASES, *OPEN_CLIP]
    GOLDEN.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(GOLDEN / "images.npz", images=images().permute(0, 2, 3, 1).numpy())
    photo().save(GOLDEN / "photo.png")
    with torch.no_grad():
        for name in names:
            shutil.rmtree(GOLDEN / name, ignore_errors=True)
            record_open_clip(name) if name in OPEN_CLIP else record(name)
