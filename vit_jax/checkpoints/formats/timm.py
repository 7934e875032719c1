"""State dicts of timm's models, and the call that builds their model.

A state dict is a file of its own, or lies beside a `config.json` in a folder from the Hugging Face
hub. The config tells which model it is of; see `vit_jax.models.timm_names`.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints import array_files, files
from vit_jax.checkpoints.formats import Format, ImageSize, _timm_export, _torch_layout
from vit_jax.checkpoints.formats import _positions as positions
from vit_jax.checkpoints.formats._timm import (
    MARKS,
    MIXER,
    VIT,
    VIT_SWIGLU,
    grid_of,
    prepare,
    table_of,
)
from vit_jax.checkpoints.formats._timm_export import ratio
from vit_jax.checkpoints.formats._timm_states import fuse
from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import (
    CLS,
    POSITIONS,
    TOKEN_MIXING,
    Arrays,
    Weights,
    from_params,
)
from vit_jax.errors import UserError
from vit_jax.models import timm_names
from vit_jax.models.layers.basic import NORM_EPSILON
from vit_jax.types import Params

EXPRESSES = frozenset(
    {"a ViT", "a Mixer", "mean pooling", "class token", "attention pooling", "registers"}
    | {"exact GELU", "quick GELU", "SiLU", "another norm epsilon", "no bias of patches"}
    | {"no biases of queries, keys and values", "no bias after attention", "no biases in the MLP"}
    | {"a norm of patches", "a norm before the blocks", "a norm after pooling", "no last norm"}
    | {"a norm inside attention", "a norm inside the MLP", "post-norm blocks"}
    | {"pooling of all tokens"}
    | {"LayerScale", "query-key norm", "RMSNorm", "SwiGLU", "sin-cos positions", "no positions"}
    | {"an unread class token"}
)

WRITTEN = "vit_jax"
"""The key of the header of files that are written here."""

CREATED = "timm"
"""The key of the header that tells what `timm.create_model` makes the model of."""

LEFT = (
    *("activation", "norm_epsilon", "num_heads", "pooling", "class_token", "pool_prefix"),
    *("post_norm", "position", "class_token_position"),
)
"""The fields that this header tells, because no array shows them."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")

ASSUMED = (
    "{reason}; assumed are exact GELU (timm runs it unless a model"
    " is built with act_layer='gelu_tanh'), norms with epsilon 1e-6 and no rotary positions"
)


def matches(source: Source) -> bool:
    """Returns whether a file has names of timm's models, or a folder timm's config."""
    return bool(MARKS & source.names) or (source.has(*WEIGHTS) and "architecture" in source.config)


def read(source: Source) -> Weights:
    """Returns the weights of a state dict, with the fields of its model that its config tells.

    Raises:
      UserError: the model has layers that this package has not.
    """
    if source.folder is None:
        state = source.arrays()
    else:
        name = next(name for name in WEIGHTS if source.has(name))
        state = array_files.read_arrays(source.folder / name)
    origin, named = _origin(source), source.config.get("architecture")
    written = {} if origin else _written(source)
    weights = from_state(state, origin, written)
    if origin or written or not isinstance(named, str):
        return weights
    if not MARKS & state.keys():
        raise UserError(f"{source.path}: timm's {named!r:.100} is no model of this package")
    unknown = ASSUMED.format(
        reason=f"its config.json names {named!r:.100}, which is not known here"
    )
    return dataclasses.replace(weights, notes=(unknown,) if weights.notes else ())


def from_state(
    state: Mapping[str, np.ndarray],
    origin: timm_names.Origin | None,
    written: Mapping[str, Any] = MappingProxyType({}),
) -> Weights:
    """Returns the weights of a state dict.

    origin: the model that it is of, where that is known. written: the fields that the file tells.
    """
    args, grid = origin.args if origin else {}, grid_of(state)
    state = prepare(state, args if origin else None)
    arrays, unknown = _torch_layout.from_state(state, table_of(state))
    dropped = [name for name, x in arrays.items() if name.endswith("_norm/bias") and _idle(name, x)]
    arrays = {name: x for name, x in arrays.items() if name not in dropped}
    ignored = tuple(f"{name}: zeros, and the model has no such bias" for name in dropped)
    fields = _told(origin) if origin else {**_assumed(state), **written}
    assumed = ASSUMED.format(reason="timm's config.json is not beside the file")
    return Weights(
        arrays=arrays,
        format="timm state dict",
        class_row=written.get("class_token_position"),
        grid=grid or (_grid(origin, arrays) if origin else None),
        ignored=ignored,
        unknown=tuple(unknown),
        notes=(assumed,) if fields and not (origin or written) else (),
        fields=fields,
        interpolation=_interpolation(args),
        keeps_aspect=bool(args.get("pos_embed_ar_preserving")),
    )


def _idle(name: str, array: np.ndarray) -> bool:
    """Returns whether a bias of a norm of queries or keys changes nothing."""
    return name.endswith(("query_norm/bias", "key_norm/bias")) and not np.any(array)


def _origin(source: Source) -> timm_names.Origin | None:
    """Returns the model that timm's config names: that of the folder, or beside the file.

    What `write` left in the header of the file goes first.
    """
    config = source.config
    name = config.get("architecture")
    if _header(source) or not isinstance(name, str):
        return _written_origin(source)
    args = dict(config.get("model_args") or {})
    pooling = config.get("global_pool")
    if isinstance(pooling, str) and "global_pool" not in args:
        args["global_pool"] = pooling
    size = (config.get("pretrained_cfg") or config).get("input_size")
    found = timm_names.find(name, args)
    if found is None or not isinstance(size, list | tuple) or len(size) != 3:
        return found
    return dataclasses.replace(found, image_size=(size[1], size[2]))


def _written_origin(source: Source) -> timm_names.Origin | None:
    """Returns the model that `write` left in the header of a file as timm's class."""
    header = _header(source)
    if not isinstance(header.get("class"), str) or not isinstance(header.get("args"), dict):
        return None
    kind, fields = timm_names.convert(header["class"], header["args"], str(source.path))
    return timm_names.Origin(kind, fields, header["args"])


def _written(source: Source) -> Mapping[str, Any]:
    """Returns the fields that `write` left in the header of a file, {} if it is of others."""
    header = _header(source)
    return {name: header[name] for name in LEFT if name in header}


def created(path: epath.PathLike) -> Mapping[str, Any]:
    """Returns the keys of timm's `config.json` that make the model of a file written here.

    These are `architecture` and `model_args`. The result is {} where `timm.create_model` cannot
    make the model of values that JSON can hold.
    """
    with Source.open(path) as source:
        return _header(source, CREATED)


def _header(source: Source, key: str = WRITTEN) -> Mapping[str, Any]:
    """Returns what `write` left in the header of a file, {} if it is of others.

    Raises:
      UserError: a header that claims to be of this package holds no fields.
    """
    text = source.metadata.get(key, "{}")
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{source.path}: its header tells no fields of a model")
    return header


def _interpolation(args: Mapping[str, Any]) -> str:
    """Returns the resizing of positions of timm's model; see `surgery.resize_positions`."""
    if args.get("pos_embed") == "factorized":
        return "torch_bilinear"
    if args.get("pos_embed_align_corners"):
        return "corners"
    mode = args.get("pos_embed_interp_mode", "bicubic")
    return mode if args.get("pos_embed_antialias", True) else f"torch_{mode}"


def _told(origin: timm_names.Origin) -> dict[str, Any]:
    """Returns the fields that a config tells and arrays do not show."""
    return {name: x for name, x in origin.fields.items() if name not in _SHOWN}


_SHOWN = frozenset(
    (
        *("patch_size", "width", "depth", "mlp_dim", "norm", "mlp", "qkv_bias", "key_bias"),
        *("proj_bias", "mlp_bias", "patch_bias", "embed_norm", "pre_norm", "last_norm", "fc_norm"),
        *("attention_norm", "mlp_norm", "layer_scale", "mlp_layer_scale", "qk_norm", "stages"),
        *("num_registers", "class_token_position", "position_bias_dim"),
        *("distill_token", "differential", "tokens_mlp_dim", "channels_mlp_dim", "width_factor"),
    )
)
"""Fields that the arrays of a file show by themselves."""


def _assumed(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of a state dict without a config, as timm's defaults are."""
    if "stem.conv.weight" in state:
        return {}
    fields: dict[str, Any] = {"activation": "gelu"}
    if "stem.proj.weight" in state:
        return fields
    fields["norm_epsilon"] = 1e-6
    if "patch_embed.backbone.conv.weight" in state:
        fields |= timm_names.STEM
    # Eva's models may have rotary positions, which leave no array, beside a table of them. Those of
    # the Perception Encoder have a norm before the blocks and attention pooling, as no other has.
    biases = [f"blocks.0.attn.{part}.bias" in state for part in ("query", "key")]
    is_eva = "blocks.0.gamma_1" in state or biases == [True, False]
    is_eva |= {"norm_pre.weight", "attn_pool.latent"} <= state.keys()
    has_bias = any("rel_pos" in name or "relative_position" in name for name in state)
    if is_eva and not has_bias and "blocks.0.attn.frequencies" not in state:
        fields["position"] = None
    return fields


def _grid(origin: timm_names.Origin, arrays: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """Returns (rows, columns) of the patches of images of the size for which a model was built."""
    size = origin.args.get("img_size") or origin.image_size
    kernel = arrays.get("backbone/patch_embed/kernel")
    if size is None or kernel is None or any("/stem/" in name for name in arrays):
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height // kernel.shape[0], width // kernel.shape[1]


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a `.safetensors` file; see `Format.write`."""
    traits, backbone = models.traits_of(model), models.backbone_of(model)
    arrays, path, class_row = from_params(params, model), os.fspath(path), False
    misfit = _misfit(backbone) if traits.kind == "a ViT" else ""
    if misfit or not traits.all_named <= EXPRESSES:
        target, args, state = _timm_export.described(arrays, backbone, image_size, misfit)
        header = {WRITTEN: json.dumps({"class": target.name, "args": args})}
        files.write_safetensors(path, state, **header)
        return f"wrote {path} in timm's names\ntimm: {target.call(path, args)}"
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
    args = arguments(arrays, backbone, size, class_row=class_row)
    header = {WRITTEN: json.dumps(_left(backbone, arrays, class_row))}
    if traits.kind == "a ViT" and not any(isinstance(value, _Code) for value in args.values()):
        made = {"architecture": _architecture(backbone), "model_args": args}
        header[CREATED] = json.dumps(made)
    files.write_safetensors(path, _state_dict(arrays, traits.named), **header)
    return f"wrote {path} in timm's names\ntimm: {call(path, backbone, args)}"


def _left(backbone: Any, arrays: Arrays, class_row: bool) -> dict[str, Any]:
    """Returns the fields of the file's own model that its arrays do not show."""
    fields = {name: getattr(backbone, name) for name in LEFT if hasattr(backbone, name)}
    if "pooling" in fields:
        fields |= {"class_token": CLS in arrays, "class_token_position": class_row}
        fields |= {"position": "learned" if POSITIONS in arrays else "none"}
    return fields


def _state_dict(arrays: Arrays, named: frozenset[str]) -> Arrays:
    if TOKEN_MIXING in arrays:
        return _torch_layout.to_state(arrays, MIXER)
    table = VIT_SWIGLU if "SwiGLU" in named else VIT
    state = fuse(_torch_layout.to_state(arrays, table))
    if "query-key norm" in named and "RMSNorm" not in named:
        for name in [n for n in state if n.endswith(("q_norm.weight", "k_norm.weight"))]:
            # timm's norm has a bias; that of this package is the same without.
            state[name.replace("weight", "bias")] = np.zeros_like(state[name])
    return state


_SIZES = {192: "tiny", 384: "small", 1024: "large"}
"""The word for a width in timm's names. The arguments beside a name tell everything that counts."""


class _Code(str):
    """A value of a call that is a Python expression, which JSON cannot hold."""

    def __repr__(self) -> str:
        return str(self)


def arguments(
    arrays: Mapping[str, np.ndarray], backbone: Any, image_size: Sequence[int], *, class_row: bool
) -> dict[str, Any]:
    """Returns the arguments with which timm makes a model with the same logits."""
    mixer = TOKEN_MIXING in arrays
    kernel = arrays["backbone/patch_embed/kernel"]
    head = arrays.get("head/bias", np.empty(0))
    return {
        "num_classes": len(head),
        "img_size": tuple(image_size),
        "patch_size": _side(kernel.shape[:2]),
        "in_chans": kernel.shape[2],
        **(_mixer_arguments(backbone) if mixer else _vit_arguments(arrays, backbone, class_row)),
    }


def call(path: str, backbone: Any, args: Mapping[str, Any]) -> str:
    """Returns the statements that make `model`, in timm, of a file and the `arguments`."""
    text = ", ".join(f"{key}={value!r}" for key, value in args.items())
    if "num_blocks" in args:
        # The named Mixers of timm refuse another patch size or width.
        made = f"model = timm.models.mlp_mixer.MlpMixer({text})"
        return f"{made}; timm.models.load_checkpoint(model, {path!r})"
    name = _architecture(backbone)
    return f'model = timm.create_model("{name}", checkpoint_path={path!r}, {text})'


def _architecture(backbone: Any) -> str:
    """Returns the name in timm of a ViT, whose sizes the arguments replace."""
    return f"vit_{_SIZES.get(backbone.width, 'base')}_patch16_224"


def _vit_arguments(
    arrays: Mapping[str, np.ndarray], backbone: Any, class_row: bool
) -> dict[str, Any]:
    mlp_dim = arrays["backbone/blocks_0/mlp/dense1/kernel"].shape[1]
    arguments: dict[str, Any] = {
        "embed_dim": backbone.width,
        "depth": backbone.depth,
        "num_heads": backbone.num_heads,
        "mlp_ratio": ratio(mlp_dim, backbone.width),
        "global_pool": _timm_export.POOLINGS[backbone.pooling],
        "class_token": "backbone/cls" in arrays,
        "fc_norm": backbone.fc_norm,
        "act_layer": "silu" if backbone.mlp == "swiglu" else backbone.activation,
    }
    if "backbone/pos_embed" not in arrays:
        arguments["pos_embed"] = "none"
    elif not class_row:
        arguments["no_embed_class"] = True
    fields = {"reg_tokens": "num_registers", "init_values": "layer_scale", "qk_norm": "qk_norm"}
    fields |= {"pre_norm": "pre_norm", "pool_include_prefix": "pool_prefix"}
    fields |= {"scale_attn_norm": "attention_norm", "scale_mlp_norm": "mlp_norm"}
    arguments |= {k: getattr(backbone, v) for k, v in fields.items() if getattr(backbone, v)}
    for key, kept in (("qkv_bias", backbone.qkv_bias), ("proj_bias", backbone.proj_bias)):
        if not kept:
            arguments[key] = False
    if not (backbone.last_norm or backbone.fc_norm):
        arguments["final_norm"] = False
    if backbone.post_norm:
        arguments["block_fn"] = _Code("timm.models.vision_transformer.ResPostBlock")
    norm = {"layernorm": "LayerNorm", "rmsnorm": "RmsNorm"}[backbone.norm]
    norm = _Code(f"functools.partial(timm.layers.{norm}, eps={backbone.norm_epsilon:g})")
    if (backbone.norm, backbone.norm_epsilon) != ("layernorm", NORM_EPSILON):
        arguments["norm_layer"] = norm
    if backbone.embed_norm:
        arguments["embed_norm_layer"] = norm
    if backbone.mlp == "swiglu":
        arguments["mlp_layer"] = _Code("timm.layers.SwiGLU")
    return arguments


def _misfit(backbone: Any) -> str:
    """Returns two fields of a model whose values timm's `VisionTransformer` cannot combine.

    Some of its arguments set two fields at once. The text is "" if every combination has a place.
    """
    together = (
        ("patch_bias", not backbone.pre_norm, "pre_norm", backbone.pre_norm),
        ("mlp_bias", backbone.proj_bias, "proj_bias", backbone.proj_bias),
        ("last_norm", not backbone.fc_norm, "fc_norm", True),
    )
    for field, wanted, other, value in together:
        if getattr(backbone, field) != wanted and getattr(backbone, other) == value:
            return f"{field}={not wanted} with {other}={value}"
    return ""


def _mixer_arguments(backbone: Any) -> dict[str, Any]:
    ratios = (backbone.tokens_mlp_dim, backbone.channels_mlp_dim)
    return {
        "embed_dim": backbone.width,
        "num_blocks": backbone.depth,
        "mlp_ratio": tuple(ratio(dim, backbone.width) for dim in ratios),
        "act_layer": _Code(f"timm.layers.get_act_layer({backbone.activation!r})"),
    }


def _side(size: Sequence[int]) -> int | tuple[int, ...]:
    return size[0] if len(set(size)) == 1 else tuple(size)


FORMAT = Format(
    label="timm state dict",
    matches=matches,
    read=read,
    write=write,
    expresses=EXPRESSES,
    alternatives=tuple(target.expresses for target in _timm_export.TARGETS),
    ending=".safetensors",
)
