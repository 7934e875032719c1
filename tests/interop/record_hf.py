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
import sentencepiece
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
TINY_TEXT = TEXT | {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
OWL = {
    "vision_config": TINY,
    "text_config": TINY_TEXT | {"hidden_size": 6},
    "projection_dim": 6,
}
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
    "siglip2": (
        "Siglip2Model",
        "Siglip2Config",
        {
            "vision_config": {k: v for k, v in TINY.items() if k != "image_size"}
            | {"num_patches": 16},
            "text_config": TINY_TEXT | {"projection_size": 8},
        },
    ),
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
    "owlvit": ("OwlViTForObjectDetection", "OwlViTConfig", OWL),
    "owlv2": ("Owlv2ForObjectDetection", "Owlv2Config", OWL),
    "yolos": (
        "YolosForObjectDetection",
        "YolosConfig",
        TINY | LABELS | {"num_hidden_layers": 3, "image_size": [16, 24], "num_detection_tokens": 5},
    ),
    "beit": ("BeitForImageClassification", "BeitConfig", BEIT),
    "data2vec": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", BEIT),
    "aimv2_lit": (
        "Aimv2Model",
        "Aimv2Config",
        {
            "vision_config": TINY | {"use_head": True},
            "text_config": TINY_TEXT | {"eos_token_id": 39},
            "projection_dim": 6,
        },
    ),
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


def as_naflex(x):
    """Returns images as the patches and the sizes that a model of any grid takes."""
    patches = x.reshape(2, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, -1)
    mask, shapes = torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4]] * 2)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def output_of(model, x):
    """Returns logits, image embeddings, or else the pooled or averaged tokens."""
    name = type(model).__name__
    inputs = as_naflex(x) if name.startswith("Siglip2") else {"pixel_values": x}
    if name in TWO_TOWERS:
        out = model.get_image_features(**inputs)
        return getattr(out, "pooler_output", out)
    if name.startswith("Owl"):
        part = getattr(model, name.partition("For")[0].lower())
        return part.vision_model(x).pooler_output
    if name.startswith("Yolos"):
        return model(x).logits
    model = model.vit if name == "ViTMAEForPreTraining" else model
    out = model(**inputs)
    found = [getattr(out, key, None) for key in ("logits", "image_embeds")]
    if name.startswith(("Siglip", "Aimv2")):
        found.append(out.pooler_output)
    tokens = out.last_hidden_state if hasattr(out, "last_hidden_state") else None
    if tokens is not None:
        found.append(tokens.mean(1) if name.startswith(("IJepa", "Aimv2")) else tokens[:, 0])
    return next(x for x in found if x is not None)


TWO_TOWERS = ("CLIPModel", "SiglipModel", "Siglip2Model", "Aimv2Model")
SENTENCES = ["a cat", "A  Dog, two cats!", "the dog's coat_ ", "a cat and a dog at the coast", "ö?"]
LETTERS = "acdeghnostw',!"
NUM_TOKENS = 40


def clip_tokenizer():
    """Returns a tokenizer of CLIP with few pieces; the last two numbers are its marks."""
    merges = [("a", "t</w>"), ("c", "at</w>"), ("d", "o"), ("do", "g</w>"), ("t", "h")]
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *map("".join, merges)]
    pieces = [*pieces, *(f"unused{i}" for i in range(NUM_TOKENS - 2 - len(pieces)))]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(numbers, merges)


def siglip_tokenizer(folder):
    """Returns a tokenizer of SigLIP, with a SentencePiece model as T5's in small."""
    sentences = [re.sub(r"[^a-z ]", "", text.lower()) for text in SENTENCES]
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences * 20),
            model_writer=file,
            vocab_size=NUM_TOKENS,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return transformers.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=8)


def siglip2_tokenizer():
    """Returns a tokenizer of SigLIP 2, which is Gemma's with lower case."""
    merges = [("a", "t"), ("c", "at"), ("▁", "d"), ("▁d", "o")]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, *map("".join, merges)]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    marks = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    return transformers.Siglip2Tokenizer(numbers, merges, **marks)


def t5_tokenizer():
    """Returns the tokenizer beside open_clip's SigLIP: T5's."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, "at", "▁a", "cat", "▁do"]
    vocab = [(piece, -1.0 - number / 9) for number, piece in enumerate(pieces)]
    return transformers.T5Tokenizer(vocab, extra_ids=0, pad_token="</s>")


TOKENIZERS = {
    "clip": clip_tokenizer,
    "aimv2_lit": clip_tokenizer,
    "siglip2": siglip2_tokenizer,
    "open_clip": clip_tokenizer,
    "open_clip_siglip": t5_tokenizer,
}


def texts_of(name, folder):
    """Writes the tokenizer of a case beside its weights; returns texts and their tokens."""
    make = TOKENIZERS.get(name)
    tokenizer = make() if make else siglip_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    length = {"padding": "max_length", "truncation": True, "max_length": 8}
    if name == "open_clip_siglip":
        tokenizer = open_clip.tokenizer.HFTokenizer(folder, 8, clean="canonicalize")
        tokens = tokenizer(SENTENCES)
    else:
        tokens = tokenizer(SENTENCES, return_tensors="pt", **length)["input_ids"]
    return {"texts": np.array(SENTENCES), "tokens": tokens.numpy()}


def photo():
    """Returns an image of smooth colors that is neither square nor of the models' size."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((41, 29), Image.Resampling.BICUBIC)


# The image processors of some cases, with the geometry of the published ones at a smaller size.
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIGLIP_PROCESSOR = ("SiglipImageProcessorPil", {"size": {"height": SIDE, "width": SIDE}})
CLIP_PROCESSOR = (
    "CLIPImageProcessorPil",
    {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
)
PROCESSORS = {
    "dinov2": (
        "BitImageProcessorPil",
        {"size": {"shortest_edge": 18}, "crop_size": {"height": SIDE, "width": SIDE}} | IMAGENET,
    ),
    **dict.fromkeys(("siglip", "siglip_vision"), SIGLIP_PROCESSOR),
    **dict.fromkeys(("clip", "clip_vision"), CLIP_PROCESSOR),
}


def photo_of(model, pixels, arrays):
    """Returns the features of an image, or the probabilities of the texts that may match it."""
    kind = type(model).__name__
    if kind in TWO_TOWERS:
        out = model(input_ids=torch.tensor(arrays["tokens"]), pixel_values=pixels)
        logits = out.logits_per_image
        squashed = logits.softmax(-1) if kind == "CLIPModel" else logits.sigmoid()
        return {"probability": squashed.numpy()}
    # Features are what comes before a projection.
    tower = getattr(model, "vision_model", model)
    out = output_of(model, pixels) if kind == "Dinov2Model" else tower(pixels).pooler_output
    return {"photo": out.numpy()}


DETECTORS = ("yolos", "owlvit", "owlv2")


def detections_of(name, model):
    """Returns scores and boxes, of YOLOS also for images of the size that it was made for."""
    if name == "yolos":
        x = images()
        wide = torch.cat([x, x[..., :8]], dim=-1)
        found = {"": model(x), "wide_": model(wide)}
        parts = {"scores": "logits", "boxes": "pred_boxes"}
        return {f"{n}{k}": out[key].numpy() for n, out in found.items() for k, key in parts.items()}
    texts = texts_of("clip", GOLDEN / name)
    tokens = torch.tensor(texts["tokens"][:3])
    # An image and its texts are given together.
    out = [model(tokens, x[None], tokens > 0) for x in images()]
    parts = {"scores": "logits", "boxes": "pred_boxes"}
    parts |= {"objectness": "objectness_logits"} if name == "owlv2" else {}
    joined = {ours: torch.cat([o[theirs] for o in out]).numpy() for ours, theirs in parts.items()}
    return {**texts, **joined}


def record(name):
    kind, config, arguments = CASES[name]
    model = draw(getattr(transformers, kind)(getattr(transformers, config)(**arguments)))
    arrays = {"output": output_of(model, images()).numpy()}
    (GOLDEN / name).mkdir()
    if type(model).__name__ in TWO_TOWERS:
        arrays |= texts_of(name, GOLDEN / name)
        inputs = as_naflex(images()) if name == "siglip2" else {"pixel_values": images()}
        tokens = torch.tensor(arrays["tokens"])
        if name == "aimv2_lit":  # This class applies its causal mask in this way alone.
            model.set_attn_implementation("eager")
            inputs["attention_mask"] = torch.ones_like(tokens)
        out = model(input_ids=tokens, **inputs)
        arrays |= {"text": out.text_embeds.numpy(), "logits": out.logits_per_image.numpy()}
    if name in DETECTORS:
        arrays |= detections_of(name, model)
    if name in PROCESSORS:
        kind, arguments = PROCESSORS[name]
        processor = getattr(transformers, kind)(**arguments)
        processor.save_pretrained(GOLDEN / name)
        pixels = processor(photo(), return_tensors="pt")["pixel_values"]
        arrays |= photo_of(model, pixels, arrays)
    model.half().save_pretrained(GOLDEN / name)
    np.savez_compressed(GOLDEN / name / "io.npz", **arrays)


COCA_TEXT = {"context_length": 7, "vocab_size": 40, "width": 8, "heads": 2, "layers": 1}
VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 4, "image_size": SIDE}
OPEN_CLIP = {
    "open_clip": {"vision_cfg": VISION | {"mlp_ratio": 1.5}},
    "open_clip_siglip": {
        "vision_cfg": VISION | {"layers": 1, "width": 8, "head_width": 4, "mlp_ratio": 1.0},
        "custom_text": True,
        "init_logit_bias": -10,
        "text_cfg": {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        | {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
        | {"context_length": 8, "vocab_size": 40, "width": 8, "heads": 2, "layers": 1}
        | {"hf_tokenizer_name": "tiny", "tokenizer_kwargs": {"clean": "canonicalize"}},
    },
    "open_clip_clipa": {
        "vision_cfg": VISION
        | {"layers": 1, "width": 8, "head_width": 4, "mlp_ratio": 1.0, "no_ln_pre": True}
        | {"pool_type": "avg", "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}
        | {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
    },
    "open_clip_coca": {
        "embed_dim": 12,
        "vision_cfg": VISION
        | {"layers": 1, "width": 16, "head_width": 8, "mlp_ratio": 1.0}
        | {"attentional_pool": True, "attn_pooler_heads": 3, "attn_pooler_queries": 2}
        | {"output_tokens": True},
        "text_cfg": COCA_TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": COCA_TEXT,
    },
}


def record_open_clip(name):
    """Records open_clip's CLIP as a folder of the hub has it."""
    text = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "text_cfg": text} | OPEN_CLIP[name]
    kind = "CustomTextCLIP" if config.get("custom_text") else "CLIP"
    kind = "CoCa" if "multimodal_cfg" in config else kind
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    model = draw(getattr(open_clip, kind)(**arguments))
    folder = GOLDEN / name
    folder.mkdir()
    arrays = {"output": model.encode_image(images(), normalize=False).numpy()}
    stored = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(stored, indent=2))
    if name in TOKENIZERS:
        arrays |= texts_of(name, folder)
        tokens = torch.tensor(arrays["tokens"])
        arrays["text"] = model.encode_text(tokens, normalize=True).numpy()
        arrays["logits"] = model.get_logits(images(), tokens)[0].numpy()
    state = {name: x.half().contiguous() for name, x in model.state_dict().items()}
    if folder.name not in (*TOKENIZERS, "open_clip_coca"):
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
