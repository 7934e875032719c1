"""State dicts of timm's VisionTransformer and MlpMixer, and the call that builds their model.

A state dict is a file of its own, or lies beside a `config.json` in a folder from the Hugging Face
hub.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints import array_files, files
from vit_jax.checkpoints.formats import Format, ImageSize, _torch_layout
from vit_jax.checkpoints.formats import _positions as positions
from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import TOKEN_MIXING, Arrays, Renames, Weights, from_params
from vit_jax.errors import UserError
from vit_jax.types import Params

EXPRESSES = frozenset(
    {"a ViT", "a Mixer", "mean pooling", "class token", "attention pooling", "registers"}
    | {"LayerScale", "query-key norm", "RMSNorm", "SwiGLU", "sin-cos positions", "no positions"}
    | {"an unread class token"}
)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")

ACTIVATION_NOTE = (
    "timm runs exact GELU unless built with act_layer='gelu_tanh'; here it is the tanh form, which"
    " moves logits by about 1e-3"
)


def _mlps(theirs: str, ours: str, swiglu: bool) -> Iterator[tuple[str, str]]:
    names = [(f"{theirs}/fc1", f"{ours}/dense1"), (f"{theirs}/fc1_x", f"{ours}/dense1")]
    yield from reversed(names) if swiglu else names
    yield f"{theirs}/fc1_g", f"{ours}/gate"
    yield f"{theirs}/fc2", f"{ours}/dense2"


def _attention(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield f"{theirs}/q_norm", f"{ours}/query_norm"
    yield f"{theirs}/k_norm", f"{ours}/key_norm"
    yield f"{theirs}/proj", f"{ours}/out"
    for part in ("query", "key", "value"):
        yield f"{theirs}/{part}", f"{ours}/{part}"


def _vit(swiglu: bool) -> Iterator[tuple[str, str]]:
    yield "patch_embed/proj", "backbone/patch_embed"
    yield "cls_token", "backbone/cls"
    yield "reg_token", "backbone/registers"
    yield "pos_embed", "backbone/pos_embed"
    block, ours = "blocks/{i}", "backbone/blocks_{i}"
    yield f"{block}/norm1", f"{ours}/norm1"
    yield from _attention(f"{block}/attn", f"{ours}/attn")
    yield f"{block}/ls1/gamma", f"{ours}/scale1"
    yield f"{block}/norm2", f"{ours}/norm2"
    yield from _mlps(f"{block}/mlp", f"{ours}/mlp", swiglu)
    yield f"{block}/ls2/gamma", f"{ours}/scale2"
    yield "norm", "backbone/norm"
    pool, ours = "attn_pool", "backbone/map_head"
    yield f"{pool}/latent", f"{ours}/probe"
    yield from _attention(pool, f"{ours}/attn")
    yield f"{pool}/norm", f"{ours}/norm"
    yield from _mlps(f"{pool}/mlp", f"{ours}/mlp", swiglu)
    yield "head", "head"


def _mixer() -> Iterator[tuple[str, str]]:
    yield "stem/proj", "backbone/patch_embed"
    block, ours = "blocks/{i}", "backbone/blocks_{i}"
    yield f"{block}/norm1", f"{ours}/norm1"
    yield f"{block}/norm2", f"{ours}/norm2"
    yield from _mlps(f"{block}/mlp_tokens", f"{ours}/token_mixing", False)
    yield from _mlps(f"{block}/mlp_channels", f"{ours}/channel_mixing", False)
    yield "norm", "backbone/norm"
    yield "head", "head"


VIT = Renames(_vit(swiglu=False))
VIT_SWIGLU = Renames(_vit(swiglu=True))
MIXER = Renames(_mixer())


def matches(source: Source) -> bool:
    """Returns whether a file has names of one of the two models, or a folder timm's config."""
    in_file = bool({"patch_embed.proj.weight", "stem.proj.weight"} & source.names)
    return in_file or (source.has(*WEIGHTS) and "architecture" in source.config)


def read(source: Source) -> Weights:
    """Returns the weights of a state dict.

    Raises:
      UserError: the model norms after pooling, which no model of this package does.
    """
    if source.folder is None:
        state = source.arrays()
    else:
        name = next(name for name in WEIGHTS if source.has(name))
        state = array_files.read_arrays(source.folder / name)
    if "fc_norm.weight" in state:
        raise UserError(
            f"{source.path}: this timm model norms after pooling (fc_norm.weight); models here"
            " norm before it"
        )
    table = MIXER if "stem.proj.weight" in state else VIT
    arrays, unknown = _torch_layout.from_state(_split_fused(state), table)
    dropped = [name for name, x in arrays.items() if name.endswith("_norm/bias") and not np.any(x)]
    arrays = {name: x for name, x in arrays.items() if name not in dropped}
    ignored = tuple(f"{name}: zeros, and the model has no such bias" for name in dropped)
    return Weights(
        arrays=arrays,
        format="timm state dict",
        ignored=ignored,
        unknown=tuple(unknown),
        notes=(ACTIVATION_NOTE,),
    )


def _split_fused(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns `attn.qkv` and `attn_pool.kv` as query, key and value; `attn_pool.q` as query."""
    out = {}
    for name, array in state.items():
        module, _, leaf = name.rpartition(".")
        parent, _, kind = module.rpartition(".")
        parts = {"qkv": ("query", "key", "value"), "kv": ("key", "value"), "q": ("query",)}
        if kind not in parts:
            out[name] = array
        elif not array.ndim or len(array) % len(parts[kind]):
            raise UserError(
                f"{name} has shape {list(array.shape)}, not {len(parts[kind])} equal parts"
            )
        else:
            pieces = np.split(array, len(parts[kind]))
            names = (f"{parent}.{part}.{leaf}" for part in parts[kind])
            out.update(zip(names, pieces, strict=True))
    return out


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a `.safetensors` file; see `Format.write`."""
    traits, backbone = models.traits_of(model), models.backbone_of(model)
    arrays, path, class_row = from_params(params, model), os.fspath(path), False
    if traits.kind == "a Mixer":
        size = positions.check_size(arrays, image_size, arrays[TOKEN_MIXING].shape[0])
    elif "no positions" in traits.named:
        side = image_size or models.variants()["vit_b16"].input_size
        size = positions.check_size(arrays, side, None)
    else:
        # timm's table has rows for the class token and the registers, or for neither.
        wanted = False if "registers" in traits.named else None
        arrays, class_row = positions.stored(arrays, backbone, image_size, class_row=wanted)
        size = positions.image_size_of(arrays, image_size, class_row)
    files.write_safetensors(path, _state_dict(arrays, traits.named))
    call_ = call(path, arrays, backbone, size, class_row=class_row)
    return f"wrote {path} in timm's names\ntimm: {call_}"


def _state_dict(arrays: Arrays, named: frozenset[str]) -> Arrays:
    if TOKEN_MIXING in arrays:
        return _torch_layout.to_state(arrays, MIXER)
    table = VIT_SWIGLU if "SwiGLU" in named else VIT
    state = _fuse(_torch_layout.to_state(arrays, table))
    if "query-key norm" in named and "RMSNorm" not in named:
        for name in [n for n in state if n.endswith(("q_norm.weight", "k_norm.weight"))]:
            # timm's norm has a bias; that of this package is the same without.
            state[name.replace("weight", "bias")] = np.zeros_like(state[name])
    return state


def _fuse(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for name, array in state.items():
        module, _, leaf = name.rpartition(".")
        parent, _, part = module.rpartition(".")
        if part not in ("query", "key", "value"):
            out[name] = array
        elif part == "query":
            pool = parent == "attn_pool"
            parts = [state[f"{parent}.{p}.{leaf}"] for p in ("query", "key", "value")]
            if pool:
                out[f"{parent}.q.{leaf}"] = parts.pop(0)
            out[f"{parent}.{'kv' if pool else 'qkv'}.{leaf}"] = np.concatenate(parts)
    return out


def call(
    path: str,
    arrays: Mapping[str, np.ndarray],
    backbone: Any,
    image_size: Sequence[int],
    *,
    class_row: bool,
) -> str:
    """Returns the statements that make `model`, in timm, with the same logits."""
    mixer = TOKEN_MIXING in arrays
    arguments = _mixer_arguments(backbone) if mixer else _vit_arguments(arrays, backbone, class_row)
    kernel = arrays["backbone/patch_embed/kernel"]
    head = arrays.get("head/bias", np.empty(0))
    arguments = {
        "num_classes": len(head),
        "img_size": tuple(image_size),
        "patch_size": _side(kernel.shape[:2]),
        "in_chans": kernel.shape[2],
        **arguments,
    }
    text = ", ".join(f"{key}={value}" for key, value in arguments.items())
    if mixer:
        # The named Mixers of timm refuse another patch size or width.
        made = f"model = timm.models.mlp_mixer.MlpMixer({text})"
        return f"{made}; timm.models.load_checkpoint(model, {path!r})"
    return f'model = timm.create_model("vit_base_patch16_224", checkpoint_path={path!r}, {text})'


def _vit_arguments(
    arrays: Mapping[str, np.ndarray], backbone: Any, class_row: bool
) -> dict[str, Any]:
    mlp_dim = arrays["backbone/blocks_0/mlp/dense1/bias"].shape[0]
    class_token = "backbone/cls" in arrays
    arguments: dict[str, Any] = {
        "embed_dim": backbone.width,
        "depth": backbone.depth,
        "num_heads": backbone.num_heads,
        "mlp_ratio": _ratio(mlp_dim, backbone.width),
        "global_pool": {"token": "'token'", "mean": "'avg'", "map": "'map'"}[backbone.pooling],
        "class_token": class_token,
        "fc_norm": False,
        "act_layer": "'silu'" if backbone.mlp == "swiglu" else "'gelu_tanh'",
    }
    if "backbone/pos_embed" not in arrays:
        arguments["pos_embed"] = "'none'"
    elif not class_row:
        arguments["no_embed_class"] = True
    if backbone.num_registers:
        arguments["reg_tokens"] = backbone.num_registers
    if backbone.layer_scale is not None:
        arguments["init_values"] = backbone.layer_scale
    if backbone.qk_norm:
        arguments["qk_norm"] = True
    if backbone.norm == "rmsnorm":
        arguments["norm_layer"] = "functools.partial(timm.layers.RmsNorm, eps=1e-6)"
    if backbone.mlp == "swiglu":
        arguments["mlp_layer"] = "timm.layers.SwiGLU"
    return arguments


def _mixer_arguments(backbone: Any) -> dict[str, Any]:
    ratios = (backbone.tokens_mlp_dim, backbone.channels_mlp_dim)
    return {
        "embed_dim": backbone.width,
        "num_blocks": backbone.depth,
        "mlp_ratio": tuple(_ratio(dim, backbone.width) for dim in ratios),
        "act_layer": "timm.layers.GELUTanh",
    }


def _ratio(mlp_dim: int, width: int) -> float:
    """Returns a factor that timm's `int(width * ratio)` turns into exactly `mlp_dim`."""
    ratio = mlp_dim / width
    while int(width * ratio) < mlp_dim:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _side(size: Sequence[int]) -> int | tuple[int, ...]:
    return size[0] if len(set(size)) == 1 else tuple(size)


FORMAT = Format(
    label="timm state dict",
    matches=matches,
    read=read,
    write=write,
    expresses=EXPRESSES,
    ending=".safetensors",
)
