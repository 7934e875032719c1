"""Writes vit_jax/models/hub_names.json: the models of the Hugging Face hub by their names, as data.

    python scripts/hub_names.py            # needs the extra `interop`

The names and the settings that their published configs have beside the defaults are below. Every
model is built by its own library, without memory for its arrays, and read as a folder of it would
be; models of open_clip are found by their names in that package's own list.
"""

import dataclasses
import inspect
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import open_clip
import torch
import transformers
from open_clip import pretrained
from transformers.core_model_loading import revert_weight_conversion

from vit_jax.checkpoints.fit.inference import infer_config
from vit_jax.checkpoints.formats import hf
from vit_jax.checkpoints.formats import open_clip as open_clip_format
from vit_jax.checkpoints.formats._hf import by_model_type
from vit_jax.models.traits import effective_fields, fields_of
from vit_jax.models.vit import VisionTransformer

SIZE_FIELDS = ("patch_size", "width", "depth", "num_heads")
PATH = pathlib.Path(__file__).parents[1] / "vit_jax" / "models" / "hub_names.json"


def sized(width: int, depth: int, heads: int, mlp_dim: int) -> dict[str, int]:
    """Returns sizes under the keys that most configs of transformers have."""
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": mlp_dim}


SIZES = {
    "ti": sized(192, 12, 3, 768),
    "s": sized(384, 12, 6, 1536),
    "b": sized(768, 12, 12, 3072),
    "l": sized(1024, 24, 16, 4096),
    "h": sized(1280, 32, 16, 5120),
    "so400m": sized(1152, 27, 16, 4304),
    "gopt": sized(1536, 40, 16, 6144),
    "dinov2_g": {**sized(1536, 40, 24, 6144), "use_swiglu_ffn": True},
    "s_plus": {**sized(384, 12, 6, 1536), "use_gated_mlp": True, "hidden_act": "silu"},
    "h_plus": {**sized(1280, 32, 20, 5120), "use_gated_mlp": True, "hidden_act": "silu"},
    "7b": {**sized(4096, 40, 32, 8192), "use_gated_mlp": True, "hidden_act": "silu"},
    "aim_l": sized(1024, 24, 8, 2816),
    "aim_h": sized(1536, 24, 12, 4096),
    "aim_1b": sized(2048, 24, 16, 5632),
    "aim_3b": sized(3072, 24, 24, 8192),
}

# (model_type, further settings, rows of a name, a size and the side of a patch).
TABLES: tuple[tuple[str, dict[str, Any], str], ...] = (
    (
        "vit",
        {},
        """
        google/vit-base-patch16-224                b 16
        google/vit-base-patch16-224-in21k          b 16
        google/vit-base-patch16-384                b 16
        google/vit-base-patch32-224-in21k          b 32
        google/vit-base-patch32-384                b 32
        google/vit-large-patch16-224               l 16
        google/vit-large-patch16-224-in21k         l 16
        google/vit-large-patch16-384               l 16
        google/vit-large-patch32-224-in21k         l 32
        google/vit-large-patch32-384               l 32
        google/vit-huge-patch14-224-in21k          h 14
        facebook/dino-vits8                        s 8
        facebook/dino-vits16                       s 16
        facebook/dino-vitb8                        b 8
        facebook/dino-vitb16                       b 16
        facebook/deit-tiny-patch16-224             ti 16
        facebook/deit-small-patch16-224            s 16
        facebook/deit-base-patch16-224             b 16
        facebook/deit-base-patch16-384             b 16
        """,
    ),
    (
        "vit_mae",
        {},
        """
        facebook/vit-mae-base                      b 16
        facebook/vit-mae-large                     l 16
        facebook/vit-mae-huge                      h 14
        """,
    ),
    (
        "deit",
        {},
        """
        facebook/deit-tiny-distilled-patch16-224   ti 16
        facebook/deit-small-distilled-patch16-224  s 16
        facebook/deit-base-distilled-patch16-224   b 16
        facebook/deit-base-distilled-patch16-384   b 16
        """,
    ),
    (
        "vit_msn",
        {},
        """
        facebook/vit-msn-small                     s 16
        facebook/vit-msn-base                      b 16
        facebook/vit-msn-large                     l 16
        """,
    ),
    (
        "dinov2",
        {},
        """
        facebook/dinov2-small                      s 14
        facebook/dinov2-base                       b 14
        facebook/dinov2-large                      l 14
        facebook/dinov2-giant                      dinov2_g 14
        """,
    ),
    (
        "dinov2_with_registers",
        {"num_register_tokens": 4},
        """
        facebook/dinov2-with-registers-small       s 14
        facebook/dinov2-with-registers-base        b 14
        facebook/dinov2-with-registers-large       l 14
        facebook/dinov2-with-registers-giant       dinov2_g 14
        """,
    ),
    (
        "dinov3_vit",
        {"num_register_tokens": 4},
        """
        facebook/dinov3-vits16-pretrain-lvd1689m       s 16
        facebook/dinov3-vits16plus-pretrain-lvd1689m   s_plus 16
        facebook/dinov3-vitb16-pretrain-lvd1689m       b 16
        facebook/dinov3-vitl16-pretrain-lvd1689m       l 16
        facebook/dinov3-vith16plus-pretrain-lvd1689m   h_plus 16
        facebook/dinov3-vit7b16-pretrain-lvd1689m      7b 16
        """,
    ),
    (
        "siglip_vision_model",
        {},
        """
        google/siglip-base-patch16-224             b 16
        google/siglip-base-patch16-256             b 16
        google/siglip-base-patch16-384             b 16
        google/siglip-base-patch16-512             b 16
        google/siglip-large-patch16-256            l 16
        google/siglip-large-patch16-384            l 16
        google/siglip-so400m-patch14-224           so400m 14
        google/siglip-so400m-patch14-384           so400m 14
        google/siglip2-base-patch16-224            b 16
        google/siglip2-base-patch16-256            b 16
        google/siglip2-base-patch16-384            b 16
        google/siglip2-base-patch16-512            b 16
        google/siglip2-base-patch32-256            b 32
        google/siglip2-large-patch16-256           l 16
        google/siglip2-large-patch16-384           l 16
        google/siglip2-large-patch16-512           l 16
        google/siglip2-so400m-patch14-224          so400m 14
        google/siglip2-so400m-patch14-384          so400m 14
        google/siglip2-so400m-patch16-256          so400m 16
        google/siglip2-so400m-patch16-384          so400m 16
        google/siglip2-so400m-patch16-512          so400m 16
        google/siglip2-giant-opt-patch16-256       gopt 16
        google/siglip2-giant-opt-patch16-384       gopt 16
        """,
    ),
    (
        "clip_vision_model",
        {},
        """
        openai/clip-vit-base-patch32               b 32
        openai/clip-vit-base-patch16               b 16
        openai/clip-vit-large-patch14              l 14
        openai/clip-vit-large-patch14-336          l 14
        """,
    ),
    (
        "beit",
        {"use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        """
        microsoft/beit-base-patch16-224                 b 16
        microsoft/beit-base-patch16-384                 b 16
        microsoft/beit-base-patch16-224-pt22k-ft22k     b 16
        microsoft/beit-large-patch16-224                l 16
        microsoft/beit-large-patch16-384                l 16
        microsoft/beit-large-patch16-512                l 16
        microsoft/beit-large-patch16-224-pt22k-ft22k    l 16
        """,
    ),
    (
        "aimv2_vision_model",
        {"use_head": False},
        """
        apple/aimv2-large-patch14-224              aim_l 14
        apple/aimv2-huge-patch14-224               aim_h 14
        apple/aimv2-1B-patch14-224                 aim_1b 14
        apple/aimv2-3B-patch14-224                 aim_3b 14
        """,
    ),
)

OF_OPEN_CLIP = (
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
    "laion/CoCa-ViT-L-14-laion2B-s13B-b90k",
)


CLASSES = {"deit": transformers.DeiTForImageClassificationWithTeacher}
"""Classes that tell more than the bare model: a token for distillation by its head."""


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Returns zeros of the shapes of a state dict, which take no memory."""
    zero = np.zeros((), np.float32)
    return {name: np.broadcast_to(zero, tuple(x.shape)) for name, x in state.items()}


def of_transformers(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a model of transformers."""
    config = transformers.AutoConfig.for_model(kind, **settings)
    with torch.device("meta"):
        model = CLASSES.get(kind, transformers.AutoModel.from_config)(config)
    # In memory some arrays have other names than in files.
    state = revert_weight_conversion(model, model.state_dict())
    family = by_model_type(kind)
    assert family is not None
    fields = infer_config(hf.of_tower("image", shapes_of(state), family, config.to_dict()))
    if "layer_scale" in fields:
        # What new parameters start from is in no array.
        initial = getattr(config, "layer_scale_init_value", None)
        fields["layer_scale"] = initial or config.layerscale_value
    return fields


def of_open_clip(name: str) -> dict[str, Any]:
    """Returns the fields of the image tower that open_clip's list has for a name of the hub."""
    for architecture, tag in open_clip.list_pretrained():
        config = pretrained.get_pretrained_cfg(architecture, tag)
        if str(config.get("hf_hub", "")).rstrip("/") == name:
            found = open_clip.get_model_config(architecture)
            break
    kind = open_clip.CoCa if "multimodal_cfg" in found else open_clip.CLIP
    known = inspect.signature(kind).parameters
    with torch.device("meta"):
        model = kind(**{key: value for key, value in found.items() if key in known})
    weights = open_clip_format.own_tower(shapes_of(model.state_dict()), {"model_cfg": found}, name)
    return infer_config(weights)


def changed(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a backbone without which it would be another."""
    names = [f.name for f in dataclasses.fields(VisionTransformer) if f.name in fields]
    found = {name: fields[name] for name in names if name not in ("name", "parent")}
    whole = effective(found)
    for name in list(found):
        fewer = {key: value for key, value in found.items() if key != name}
        if name not in SIZE_FIELDS and effective(fewer) == whole:
            found = fewer
    return found


def effective(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns what a backbone with some fields computes."""
    return effective_fields(fields_of(VisionTransformer(**fields)))


def main() -> None:
    table = {}
    for kind, more, rows in TABLES:
        for row in rows.strip().splitlines():
            name, size, patch = row.split()
            settings = {**SIZES[size], "patch_size": int(patch), **more}
            table[name] = changed(of_transformers(kind, settings))
    for name in OF_OPEN_CLIP:
        table[name] = changed(of_open_clip(name))
    versions = {"transformers": transformers.__version__, "open_clip": open_clip.__version__}
    text = ",\n".join(f"{json.dumps(n)}: {json.dumps(row)}" for n, row in sorted(table.items()))
    PATH.write_text(json.dumps(versions)[:-1] + f', "models": {{\n{text}\n}}}}\n')
    print(f"{PATH}: {len(table)} names, {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
