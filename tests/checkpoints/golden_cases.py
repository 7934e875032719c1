"""The stored cases of the two JAX codebases: files, inputs and outputs, and models to match."""

import json
import pathlib

import numpy as np
import sampled

from vit_jax import models

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def cases(folder, prefix):
    """Names of the stored cases that start so, with all their files."""
    separator = {"vision_transformer": ".", "big_vision": "_"}[folder]
    ending = f"{separator}params.npz"
    names = [path.name for path in (GOLDEN / folder).glob(f"{prefix}*{ending}")]
    return sorted(name.removesuffix(ending) for name in names)


def load_case(folder, case):
    """(configuration, path of the checkpoint, inputs and outputs)."""
    separator = {"vision_transformer": ".", "big_vision": "_"}[folder]
    base = GOLDEN / folder
    config = json.loads((base / f"{case}.json").read_text())
    io = sampled.load(base / f"{case}{separator}io.npz")
    return config, base / f"{case}{separator}params.npz", io


def load_timm(kind):
    """The images and outputs of a stored model of timm."""
    folder = GOLDEN / "timm_tiny"
    # A model without images of its own sees those that most of the models see.
    return dict(np.load(folder / "images.npz")) | dict(np.load(folder / kind / "io.npz"))


def vision_transformer_model(config, num_classes, **fields):
    """The ViT or hybrid of a stored configuration."""
    fields |= {
        "patch_size": config["patches"]["size"],
        "width": config["hidden_size"],
        "pooling": {"token": "token", "gap": "mean"}.get(config["classifier"], "none"),
        "class_token": config["classifier"].startswith("token"),
    }
    if config["representation_size"]:
        fields["representation_size"] = config["representation_size"]
    encoder = config["transformer"]
    if encoder is None:
        fields |= {"depth": 0, "num_heads": 1, "position": "none"}
    else:
        fields |= {
            "depth": encoder["num_layers"],
            "num_heads": encoder["num_heads"],
            "mlp_dim": encoder["mlp_dim"],
        }
    if "resnet" in config:
        fields |= {
            "stages": config["resnet"]["num_layers"],
            "width_factor": config["resnet"]["width_factor"],
        }
    name = "r50_b16" if "resnet" in config else "vit"
    return models.build(name, num_classes=num_classes, **fields)


def mixer_model(config, num_classes):
    """The Mixer of a stored configuration."""
    return models.build(
        "mixer_b16",
        num_classes=num_classes,
        patch_size=config["patches"]["size"],
        width=config["hidden_dim"],
        depth=config["num_blocks"],
        tokens_mlp_dim=config["tokens_mlp_dim"],
        channels_mlp_dim=config["channels_mlp_dim"],
    )


def big_vision_model(config, num_classes, **fields):
    """The ViT of a stored big_vision configuration."""
    config = dict(config)
    name, base = "vit", {"patch_size": [16, 16], "width": 768, "depth": 12, "num_heads": 12}
    if "variant" in config:
        name, base = f"vit_{config['variant'].replace('/', '')}", {}
    base |= {k: config[k] for k in (*base, "mlp_dim") if k in config}
    if config.get("rep_size"):
        rep_size = config["rep_size"]
        base["representation_size"] = base["width"] if rep_size is True else rep_size
    pooling = {"gap": "mean", "tok": "token", "map": "map", "0": "none"}
    position = config.get("posemb", "learn")
    return models.build(
        name,
        num_classes=num_classes,
        pooling=pooling[config.get("pool_type", "gap")],
        position="learned" if position == "learn" else position,
        class_token_position=False,
        **base,
        **fields,
    )


def assert_close(actual, expected):
    """The tolerance that the recordings state: 1e-5 of the largest magnitude."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-6)
