"""Hugging Face transformers: directories of a ViTModel or ViTForImageClassification."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints import array_files, files
from vit_jax.checkpoints.formats import Format, ImageSize, _torch_layout
from vit_jax.checkpoints.formats import _positions as positions
from vit_jax.checkpoints.source import CONFIG, Source
from vit_jax.checkpoints.weights import Renames, Weights, from_params
from vit_jax.errors import UserError
from vit_jax.types import Params

EXPRESSES = frozenset({"a ViT", "class token", "sin-cos positions", "no positions"})

SINGLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

MAX_SIDE = 1 << 20
"""Pixels of the largest side of an image or a patch that a config may name."""

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
    # These are the names inside transformers from version 5 on; files keep the ones above.
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


def matches(source: Source) -> bool:
    """Returns whether a file has names of a transformers ViT, or a folder has such a model."""
    patches = "embeddings.patch_embeddings.projection.weight"
    in_file = any(name.endswith(patches) for name in source.names)
    is_folder = source.has(CONFIG) and source.has(*SINGLE, *SHARDED)
    return in_file or (is_folder and "architecture" not in source.config)


def read(source: Source) -> Weights:
    """Returns the weights of a file, or of a folder, in one file or several, with its config.

    Without a config the number of heads is taken from the model.

    Raises:
      UserError: another architecture, a broken file, or shards outside the folder.
    """
    if source.folder is None:
        return from_state(source.arrays())
    kind = source.config.get("model_type")
    if kind != "vit":
        raise UserError(
            f"{source.folder / CONFIG} is of model_type {kind!r:.100}; only 'vit' is read"
        )
    state: dict[str, np.ndarray] = {}
    for name in _weight_files(source.folder):
        state |= array_files.read_arrays(source.folder / name)
    return from_state(state, source.config, source.folder / CONFIG)


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


def from_state(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
    place: epath.PathLike = CONFIG,
) -> Weights:
    """Returns the weights of a state dict. place: the file that the config is from."""
    state = {name.removeprefix("vit."): array for name, array in state.items()}
    # The mask token is of masked pre-training alone.
    ignored = [name for name in ("embeddings.mask_token",) if state.pop(name, None) is not None]
    arrays, unknown = _torch_layout.from_state(state, NAMES)
    notes, grid = [], None
    if config is not None:
        arrays = _split_heads(arrays, _number(config, "num_attention_heads", place), place)
        sizes = [_sides(config, key, place) for key in ("image_size", "patch_size")]
        grid = (sizes[0][0] // sizes[1][0], sizes[0][1] // sizes[1][1])
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


def _number(config: Mapping[str, Any], key: str, place: epath.PathLike) -> int:
    """Returns a whole number of a config, which says nothing of how large it may be."""
    value = config.get(key)
    if type(value) is not int or not 0 < value <= MAX_SIDE:
        raise UserError(f"{place}: {key}={value!r:.100} is no whole number from 1 to {MAX_SIDE}")
    return value


def _sides(config: Mapping[str, Any], key: str, place: epath.PathLike) -> tuple[int, int]:
    """Returns (height, width) of a config's size, which is one number or two."""
    value = config.get(key)
    if isinstance(value, list) and len(value) == 2:
        height, width = (_number({key: side}, key, place) for side in value)
        return height, width
    return (_number(config, key, place),) * 2


def _split_heads(
    arrays: Mapping[str, np.ndarray], heads: int, place: epath.PathLike
) -> dict[str, np.ndarray]:
    out = {}
    for name, array in arrays.items():
        shape: tuple[int, ...] = array.shape
        if "/attn/out/kernel" in name:
            shape = (heads, -1, shape[-1])
        elif "/attn/" in name and "/attn/out/" not in name:
            shape = (*shape[:-1], heads, -1)
        try:
            out[name] = array.reshape(shape)
        except ValueError as error:
            raise UserError(
                f"{place}: num_attention_heads={heads} does not fit {name}, which is"
                f" {list(array.shape)}"
            ) from error
    return out


def _differences(config: Mapping[str, Any]) -> Iterator[str]:
    activation, epsilon = config.get("hidden_act", "gelu"), config.get("layer_norm_eps", 1e-12)
    if activation not in TANH_GELUS:
        yield f"its config has hidden_act={activation!r:.100}; here it is GELU in the tanh form"
    if epsilon != EPSILON:
        yield f"its config has layer_norm_eps={epsilon!r:.100}; here it is {EPSILON}"


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a folder with `config.json` and `model.safetensors`; see `Format.write`."""
    backbone = models.backbone_of(model)
    arrays = from_params(params, model)
    arrays, class_row = positions.stored(arrays, backbone, image_size, class_row=True)
    size = positions.image_size_of(arrays, image_size, class_row)
    has_head = "head/kernel" in arrays
    prefix = "vit." if has_head else ""
    state = {
        name if name.startswith("classifier.") else prefix + name: array
        for name, array in _torch_layout.to_state(arrays, NAMES).items()
    }
    kernel = arrays["backbone/patch_embed/kernel"]
    config = {
        "architectures": ["ViTForImageClassification" if has_head else "ViTModel"],
        "model_type": "vit",
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "intermediate_size": arrays["backbone/blocks_0/mlp/dense1/bias"].shape[0],
        "image_size": _side(size),
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
    return f"wrote {os.fspath(path)} for transformers\ntransformers: {call(path, arrays)}"


def call(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the statement that makes `model` from a written folder."""
    if "head/kernel" in arrays:
        name, more = "ViTForImageClassification", ""
    else:
        name, more = "ViTModel", ", add_pooling_layer=False"
    return f"model = transformers.{name}.from_pretrained({os.fspath(path)!r}{more})"


def _side(size: Sequence[int]) -> int | list[int]:
    return size[0] if len(set(size)) == 1 else list(size)


FORMAT = Format(
    label="Hugging Face transformers ViT",
    matches=matches,
    read=read,
    write=write,
    expresses=EXPRESSES,
)
