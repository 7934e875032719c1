"""Tiny models of every kind that can be written, with random parameters and no zero among them."""

import flax.linen as nn
import jax
import numpy as np

from vit_jax import models

BASE = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "num_classes": 3}
MIXER = {"patch_size": 4, "width": 16, "depth": 2, "tokens_mlp_dim": 8, "channels_mlp_dim": 24}

# name: (model, its fields, height and width of its images, formats that can express it)
MODELS = {
    "token": ("vit", {}, (12, 12), "npz big_vision timm hf"),
    "token_without_position": (
        "vit",
        {"class_token_position": False},
        (12, 12),
        "npz big_vision timm hf",
    ),
    "rectangular": ("vit", {}, (8, 12), "npz big_vision timm hf"),
    "headless": ("vit", {"num_classes": None}, (12, 12), "npz big_vision timm hf"),
    "mean": ("vit", {"pooling": "mean"}, (12, 12), "npz big_vision timm hf"),
    "map": ("vit", {"pooling": "map"}, (12, 12), "big_vision timm"),
    "unpooled": ("vit", {"pooling": "none"}, (12, 12), "npz big_vision"),
    "sincos": (
        "vit",
        {"pooling": "mean", "position": "sincos2d"},
        (12, 12),
        "npz big_vision timm hf",
    ),
    "no_positions": ("vit", {"position": "none"}, (12, 12), "npz timm hf"),
    "representation": ("vit", {"representation_size": 12}, (12, 12), "npz big_vision"),
    "registers": ("vit", {"num_registers": 3, "mlp_dim": 32}, (12, 12), "timm hf"),
    "token_mean": ("vit", {"pooling": "token_mean", "mlp_dim": 32}, (12, 12), "hf"),
    "every_option": (
        "vit",
        {
            "pooling": "mean",
            "num_registers": 2,
            "layer_scale": 0.1,
            "qk_norm": True,
            "mlp": "swiglu",
        },
        (12, 12),
        "timm",
    ),
    "rmsnorm": ("vit", {"pooling": "mean", "norm": "rmsnorm", "qk_norm": True}, (12, 12), "timm"),
    "odd_mlp": ("vit", {"mlp_dim": 37, "scan": False}, (12, 12), "npz big_vision timm hf"),
    "clip_fields": (
        "vit",
        {
            **{"patch_bias": False, "pre_norm": True, "activation": "quick_gelu"},
            **{"norm_epsilon": 1e-5, "last_norm": False, "attention_norm": True, "mlp_norm": True},
        },
        (12, 12),
        "timm",
    ),
    "aimv2_fields": (
        "vit",
        {
            **{"embed_norm": True, "qkv_bias": False, "proj_bias": False, "mlp_bias": False},
            **{"fc_norm": True, "last_norm": False, "post_norm": True, "activation": "gelu"},
            **{"pooling": "mean", "class_token": True, "pool_prefix": True},
        },
        (12, 12),
        "timm",
    ),
    "silu": ("vit", {"activation": "silu", "depth": 1}, (12, 12), "timm hf"),
    "unread_class_token": ("vit", {"pooling": "mean", "class_token": True}, (12, 12), "timm"),
    "grey": ("vit", {}, (12, 12), "npz big_vision timm hf"),
    "no_encoder": (
        "vit",
        {"depth": 0, "position": "none", "pooling": "mean"},
        (12, 12),
        "npz",
    ),
    "mixer": ("mixer_b16", MIXER, (8, 8), "npz timm"),
    "hybrid": (
        "r50_b16",
        {"patch_size": 1, "stages": (1, 1), "width_factor": 0.5},
        (32, 32),
        "npz",
    ),
    "rope": ("vit", {"position": "rope"}, (12, 12), ""),
    "parallel": ("vit", {"parallel": True}, (12, 12), "timm"),
    "windows": ("vit", {"window": 2, "pooling": "mean", "scan": False}, (16, 16), ""),
    "distill": ("vit", {"distill_token": True}, (12, 12), "timm"),
    "flexi": (
        "flexivit_s",
        {"kernel_size": 4, "table_grid": 3, "scan": True},
        (12, 12),
        "big_vision",
    ),
    "bit": ("bit_r50x1", {"stages": (2, 1), "width_factor": 0.5}, (16, 24), "bit npz"),
    "bit_headless": (
        "bit_r50x1",
        {"stages": (1,), "width_factor": 0.5, "num_classes": None},
        (16, 16),
        "bit npz",
    ),
}


def build(name):
    """(model, parameters, images) of one of `MODELS`."""
    kind, fields, size, _ = MODELS[name]
    transformer = not kind.startswith(("mixer", "bit"))
    fields = {**(BASE if transformer else {"num_classes": 3}), **fields}
    model = models.build(kind, **fields)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *size, 1 if name == "grey" else 3)).astype(np.float32)
    return model, random_params(model, images), images


def random_params(model, images):
    """Parameters of the right shapes, none of them zero."""
    rng = np.random.default_rng(1)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images)["params"])

    def draw(path, leaf):
        centre = float(path[-1].key == "scale")
        return (centre + 0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)
