"""Hugging Face transformers: directories of a ViTModel or ViTForImageClassification."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from etils import epath

from vit_jax.checkpoints import array_files, files
from vit_jax.checkpoints.formats import torch_layout
from vit_jax.checkpoints.weights import Renames, Weights
from vit_jax.errors import UserError

CONFIG = "config.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
EPSILON = 1e-6


def _pairs() -> Iterator[tuple[str, str]]:
    embeddings = "embeddings"
    yield f"{embeddings}/cls_token", "backbone/cls"
    yield f"{embeddings}/position_embeddings", "backbone/pos_embed"
    yield f"{embeddings}/patch_embeddings/projection", "backbone/patch_embed"
    block, ours = "encoder/layer/{i}", "backbone/blocks_{i}"
    yield f"{block}/layernorm_before", f"{ours}/norm1"
    yield f"{block}/layernorm_after", f"{ours}/norm2"
    for part in ("query", "key", "value"):
        yield f"{block}/attention/attention/{part}", f"{ours}/attn/{part}"
    yield f"{block}/attention/output/dense", f"{ours}/attn/out"
    yield f"{block}/intermediate/dense", f"{ours}/mlp/dense1"
    yield f"{block}/output/dense", f"{ours}/mlp/dense2"
    # The names inside transformers from version 5 on; files keep the ones above.
    block = "layers/{i}"
    yield f"{block}/layernorm_before", f"{ours}/norm1"
    yield f"{block}/layernorm_after", f"{ours}/norm2"
    for part in ("query", "key", "value"):
        yield f"{block}/attention/{part[0]}_proj", f"{ours}/attn/{part}"
    yield f"{block}/attention/o_proj", f"{ours}/attn/out"
    for number in (1, 2):
        yield f"{block}/mlp/fc{number}", f"{ours}/mlp/dense{number}"
    yield "layernorm", "backbone/norm"
    yield "pooler/dense", "head/pre_logits"
    yield "classifier", "head"


NAMES = Renames(_pairs())


def is_directory(path: epath.Path) -> bool:
    """Whether `path` is a directory with a transformers model in it."""
    return (path / CONFIG).exists() and any((path / n).exists() for n in (*SINGLE, *SHARDED))


def read_directory(path: epath.Path) -> Weights:
    """The weights of a directory, in one file or several, with what its config says.

    Raises:
      UserError: another architecture, a broken file, or shards outside the directory.
    """
    config = files.read_json(path / CONFIG)
    if config.get("model_type") != "vit":
        raise UserError(
            f"{path / CONFIG} is of model_type {config.get('model_type')!r}; only 'vit' is read"
        )
    state: dict[str, np.ndarray] = {}
    for name in _weight_files(path):
        state |= array_files.read_arrays(path / name)
    return read(state, config, path)


def _weight_files(path: epath.Path) -> Sequence[str]:
    for name in SINGLE:
        if (path / name).exists():
            return [name]
    index = next(path / name for name in SHARDED if (path / name).exists())
    shards = files.read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} has no weight_map")
    for name in shards.values():
        if not isinstance(name, str) or PurePosixPath(name).name != name:
            raise UserError(f"{index} names {name!r}, which is no file of its directory")
    return sorted(set(shards.values()))


def matches(state: Mapping[str, np.ndarray]) -> bool:
    """Whether these are names of a transformers ViT."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state)


def read(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
    path: epath.PathLike = "",
) -> Weights:
    """A state dict under our names. Without `config` the number of heads is the model's."""
    state = {name.removeprefix("vit."): array for name, array in state.items()}
    # The mask token is of masked pre-training alone.
    ignored = [name for name in ("embeddings.mask_token",) if state.pop(name, None) is not None]
    arrays, unknown = torch_layout.from_state(state, NAMES)
    notes, grid = [], None
    if config is not None:
        try:
            arrays = _split_heads(arrays, int(config["num_attention_heads"]))
            grid = _grid(config)
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{path}: {CONFIG} does not fit the weights: {error!r}") from error
        notes += _differences(config)
    return Weights(
        arrays=arrays,
        format="Hugging Face transformers ViT",
        class_row=True,
        grid=grid,
        ignored=tuple(f"{name}: of masked pre-training" for name in ignored),
        unknown=tuple(unknown),
        notes=tuple(notes),
    )


def _grid(config: Mapping[str, Any]) -> tuple[int, int]:
    (height, width), (patch_height, patch_width) = (
        (size, size) if isinstance(size, int) else size
        for size in (config["image_size"], config["patch_size"])
    )
    return height // patch_height, width // patch_width


def _split_heads(arrays: Mapping[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    out = {}
    for name, array in arrays.items():
        shape: tuple[int, ...] = array.shape
        if "/attn/out/kernel" in name:
            shape = (heads, -1, shape[-1])
        elif "/attn/" in name and "/attn/out/" not in name:
            shape = (*shape[:-1], heads, -1)
        out[name] = array.reshape(shape)
    return out


def _differences(config: Mapping[str, Any]) -> Iterator[str]:
    activation, epsilon = config.get("hidden_act", "gelu"), config.get("layer_norm_eps", 1e-12)
    if activation not in TANH_GELUS:
        yield f"its config has hidden_act={activation!r}; here it is GELU in the tanh form"
    if epsilon != EPSILON:
        yield f"its config has layer_norm_eps={epsilon}; here it is {EPSILON}"


def write_directory(
    path: epath.PathLike,
    arrays: Mapping[str, np.ndarray],
    backbone: Any,
    image_size: Sequence[int],
) -> None:
    """Writes `config.json` and `model.safetensors` for `call(path, arrays)` to load."""
    has_head = "head/kernel" in arrays
    prefix = "vit." if has_head else ""
    state = {
        name if name.startswith("classifier.") else prefix + name: array
        for name, array in torch_layout.to_state(arrays, NAMES).items()
    }
    kernel = arrays["backbone/patch_embed/kernel"]
    config = {
        "architectures": ["ViTForImageClassification" if has_head else "ViTModel"],
        "model_type": "vit",
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "intermediate_size": arrays["backbone/blocks_0/mlp/dense1/bias"].shape[0],
        "image_size": _side(image_size),
        "patch_size": _side(kernel.shape[:2]),
        "num_channels": kernel.shape[2],
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": EPSILON,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if has_head:
        labels = [f"LABEL_{i}" for i in range(len(arrays["head/bias"]))]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    contents = {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        SINGLE[0]: files.safetensors_bytes(state),
    }
    files.write_directory(path, contents)


def call(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> str:
    """The statement that makes `model` from a written directory."""
    if "head/kernel" in arrays:
        name, more = "ViTForImageClassification", ""
    else:
        name, more = "ViTModel", ", add_pooling_layer=False"
    return f"model = transformers.{name}.from_pretrained({os.fspath(path)!r}{more})"


def _side(size: Sequence[int]) -> int | list[int]:
    return size[0] if len(set(size)) == 1 else list(size)
