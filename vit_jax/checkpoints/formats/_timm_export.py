"""The classes of timm that models are written for, beside its plain ViT and its Mixer.

A class is proposed its arguments from a model's fields. It fits if `timm_names`, which reads
timm's arguments, makes the same fields of them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vit_jax import models
from vit_jax.checkpoints.formats import ImageSize, _timm_states, _torch_layout
from vit_jax.checkpoints.formats import _positions as positions
from vit_jax.checkpoints.formats._timm import VIT, VIT_SWIGLU, State
from vit_jax.checkpoints.weights import PATCHES, POSITIONS, Arrays
from vit_jax.errors import UserError
from vit_jax.models import timm_names

Args = dict[str, Any]

POOLINGS = {ours: theirs for theirs, ours in timm_names.POOLINGS.items()}
_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RmsNorm"}

_NOT_COMPARED = frozenset(
    (
        *("patch_drop", "drop_path", "constant_drop_path", "drop_path_exact", "dropout"),
        *("attention_dropout", "initialization", "scan", "unroll", "remat", "attention"),
        *("dtype", "residual_dtype", "position_resize_offset", "position_resize_antialias"),
        # The arrays that are written show these.
        *("class_token_position", "position_grid", "position_bias_dim"),
    )
)
"""Fields that a class needs no place for."""

_COMMON = frozenset(
    {"a ViT", "mean pooling", "class token", "another norm epsilon", "exact GELU", "RMSNorm"}
    | {"no biases of queries, keys and values", "no bias of keys", "a norm after pooling"}
    | {"no last norm", "an unread class token", "no positions", "LayerScale"}
)
_GATED = frozenset({"SwiGLU", "a norm inside the MLP"})
_OF_EVA = frozenset(
    {"attention pooling", "attention pooling of another size", "pooling of all tokens"}
    | {"registers", "query-key norm", "a norm inside attention", "post-norm blocks"}
    | {"a norm before the blocks", "no bias of patches", "grouped-query attention"}
    | {"LayerScale on attention alone", "learned positions beside rotary ones"}
    | {f"position={kind!r}" for kind in ("rope", "rope_dinov3", "rope_mixed")}
    | {"a base of rotary positions", "a reference grid of rotary positions"}
    | {"an offset of rotary positions", "rotary positions that start with columns"}
    | {"rotary positions in interleaved pairs"}
)
_TABLES = frozenset({"position_bias='table'", "position_bias='shared_table'"})
_OF_VIT = frozenset(
    {"a norm before the blocks", "no bias of patches", "registers", "query-key norm"}
    | {"attention pooling", "pooling of all tokens", "quick GELU", "SiLU"}
)
_OF_BLOCKS = frozenset({"parallel blocks", "differential attention"})
_OF_RELPOS = frozenset(
    {"position_bias='mlp'", "position_bias='shared_mlp'", "quick GELU", "SiLU"}
    | {"query-key norm", "post-norm blocks"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A class of timm.

    Attributes:
      name, module: the class and the module of timm that has it.
      expresses: the traits that it may have a place for.
      args: returns the arguments that a model's fields ask for, but for those of all classes.
      state: returns the state dict that the class has, from one with the names of `VIT`.
      class_row: whether positions have a row for the class token; None leaves the model's.
    """

    name: str
    module: str
    expresses: frozenset[str]
    args: Callable[[Args], Args]
    state: Callable[[State, Args], State]
    class_row: bool | None = None

    def call(self, path: str, args: Args) -> str:
        """Returns the statements that make `model`, in timm, with the same outputs."""
        text = ", ".join(f"{key}={_written(key, x, self.module)}" for key, x in args.items())
        made = f"model = timm.models.{self.module}.{self.name}({text})"
        return f"{made}; timm.models.load_checkpoint(model, {path!r})"


def ratio(mlp_dim: int, width: int) -> float:
    """Returns a factor that timm's `int(width * ratio)` turns into exactly `mlp_dim`."""
    found = mlp_dim / width
    while int(width * found) < mlp_dim:
        found = math.nextafter(found, math.inf)
    return found


def described(
    arrays: Arrays, backbone: Any, image_size: ImageSize, misfit: str = ""
) -> tuple[Target, Args, State]:
    """Returns the class of timm for a model, its arguments, and its state dict.

    misfit: what timm's plain ViT has no place for, for the message.

    Raises:
      UserError: no class computes what the model does.
    """
    fields = models.effective_fields(models.fields_of(backbone))
    lacking = {"its plain ViT": [misfit]} if misfit else {}
    named = models.traits_of(backbone).all_named
    for target in (one for one in TARGETS if named <= one.expresses):
        args, placed = _args(target, fields, arrays, backbone, image_size)
        lacking[target.name] = _lacking(target, fields, args)
        if not lacking[target.name]:
            table = VIT_SWIGLU if fields["mlp"] == "swiglu" else VIT
            return target, args, target.state(_torch_layout.to_state(placed, table), args)
    reasons = "; ".join(f"{name} has no {found[0]}" for name, found in lacking.items())
    raise UserError(f"timm has no place for this model: {reasons}; write --to=orbax")


def named(
    arrays: Arrays, backbone: Any, image_size: ImageSize = None
) -> tuple[str, int, State] | None:
    """Returns the name of an architecture of timm that a model is of, whatever its head.

    image_size: a side, or (height, width), that the architecture's images must have; None for any
      size that the arrays fit.

    Returns:
      The name, the side of its images, and the state dict under its names; None if there is none.
    """
    for name, target, args in _same_architectures(backbone):
        side, *_ = next(iter(timm_names.table()[name]["tags"].values()))
        if image_size not in (None, side, (side, side)):
            continue
        _, told = timm_names.convert(target.name, args)
        with contextlib.suppress(UserError):  # Its images have another size.
            state = _placed(target, args, told, arrays=arrays, backbone=backbone, side=side)
            return name, side, state
    return None


def _same_architectures(backbone: Any) -> Iterator[tuple[str, Target, Args]]:
    """Yields the names, classes and arguments of architectures with the fields of a model.

    They have the model's pooling instead of their own.
    """
    fields = models.effective_fields(models.fields_of(backbone))
    pooling = {"global_pool": POOLINGS.get(fields["pooling"], "")}
    classes = {target.name: target for target in TARGETS}
    for name, row in timm_names.table().items():
        target, args = classes.get(row["class"]), {**row["args"], **pooling}
        sizes = (args.get("embed_dim", 768), args.get("depth", 12))
        if target is None or sizes != (fields["width"], fields["depth"]):
            continue
        try:
            lacking = _lacking(target, fields, args)
        except UserError:  # It cannot have this pooling.
            continue
        if not lacking:
            yield name, target, args


def _placed(
    target: Target, args: Args, told: Args, *, arrays: Arrays, backbone: Any, side: int
) -> State:
    """Returns the state dict of an architecture for images of its own size."""
    if POSITIONS in arrays:
        has_rows = not args.get("no_embed_class", False)
        wanted = has_rows and told.get("class_token", True)
        arrays, row = positions.stored(arrays, backbone, side, class_row=wanted)
        positions.image_size_of(arrays, side, row)
        if has_rows and backbone.num_registers:
            # Registers have positions there; those of this package have theirs added to them.
            first, rest = np.split(arrays[POSITIONS], [int(row)], axis=1)
            zeros = np.zeros((1, backbone.num_registers, first.shape[-1]), first.dtype)
            arrays = {**arrays, POSITIONS: np.concatenate([first, zeros, rest], axis=1)}
    if positions.offsets(arrays) is not None:
        positions.size_of_offsets(arrays, side)
    table = VIT_SWIGLU if told.get("mlp") == "swiglu" else VIT
    return target.state(_torch_layout.to_state(arrays, table), args)


def _args(
    target: Target, fields: Args, arrays: Arrays, backbone: Any, image_size: ImageSize
) -> tuple[Args, Arrays]:
    """Returns the arguments of a class, and the arrays with positions as it has them."""
    if POSITIONS in arrays:
        class_row = False if backbone.num_registers else target.class_row
        arrays, has_row = positions.stored(arrays, backbone, image_size, class_row=class_row)
        size = positions.image_size_of(arrays, image_size, has_row)
    else:
        has_row, told = False, positions.offsets(arrays) is not None
        size = positions.size_of_offsets(arrays, image_size if told else image_size or 224)
    more = target.args({**fields, "class_row": has_row, "has_table": POSITIONS in arrays})
    common = {
        "num_classes": len(arrays.get("head/bias", ())),
        "img_size": list(size),
        "patch_size": fields["patch_size"],
        "in_chans": arrays[PATCHES].shape[2],
        "embed_dim": fields["width"],
        "depth": fields["depth"],
        "num_heads": fields["num_heads"],
        "mlp_ratio": ratio(fields["mlp_dim"], fields["width"]),
        "global_pool": POOLINGS.get(fields["pooling"], ""),
        "qkv_bias": fields["qkv_bias"],
        "norm_layer": f"{_NORMS[fields['norm']]}({fields['norm_epsilon']!r})",
    }
    return {**common, **more}, arrays


def _lacking(target: Target, fields: Args, args: Args) -> list[str]:
    """Returns the fields, as `field=value`, that a class with these arguments has otherwise."""
    kind, told = timm_names.convert(target.name, args)
    built = models.fields_of(models.build(kind, num_classes=None, **told))
    wanted, found = compared(fields), compared(models.effective_fields(built))
    names = sorted(wanted.keys() | found.keys())
    differ = (name for name in names if wanted.get(name) != found.get(name))
    return [f"{name}={fields.get(name)!r}" for name in differ]


def compared(fields: Args) -> Args:
    """Returns the fields that a class needs a place for, and of `layer_scale` whether there is one.

    Its value matters at the start of training alone, so that files do not tell it.
    """
    kept = {name: value for name, value in fields.items() if name not in _NOT_COMPARED}
    return {**kept, "layer_scale": fields.get("layer_scale") is not None}


def _only(**args: Any) -> Args:
    """Returns the arguments that are neither None, False nor 0."""
    return {key: value for key, value in args.items() if value}


def _vit(fields: Args) -> Args:
    block = ("Diff" if fields["differential"] else "") + "ParallelScalingBlock"
    return {
        "class_token": fields["class_token"],
        "fc_norm": fields["fc_norm"],
        "act_layer": fields.get("activation", "gelu"),
        **_only(
            no_embed_class=not fields["class_row"],
            reg_tokens=fields["num_registers"],
            pos_embed=None if fields["has_table"] else "none",
            pre_norm=fields["pre_norm"],
            qk_norm=fields["qk_norm"],
            init_values=fields["layer_scale"],
            pool_include_prefix=fields.get("pool_prefix"),
            block_fn=block if fields["parallel"] else None,
            attn_layer="diff" if fields["differential"] and not fields["parallel"] else None,
        ),
        **({} if fields["last_norm"] or fields["fc_norm"] else {"final_norm": False}),
    }


def _distilled(fields: Args) -> Args:
    names = ("class_token", "fc_norm", "act_layer", "qk_norm", "init_values")
    return {name: value for name, value in _vit(fields).items() if name in names}


def _eva(fields: Args) -> Args:
    position = str(fields["position"])
    args = {
        "use_post_transformer_norm": fields["last_norm"],
        "use_fc_norm": fields["fc_norm"],
        "class_token": fields["class_token"],
        "use_abs_pos_emb": fields["has_table"],
        "attn_type": "rope" if fields.get("key_bias", True) else "eva",
    }
    args |= _only(
        no_embed_class=fields["has_table"] and not fields["class_row"],
        num_reg_tokens=fields["num_registers"],
        use_pre_transformer_norm=fields["pre_norm"],
        qk_norm=fields["qk_norm"],
        scale_attn_inner=fields["attention_norm"],
        scale_mlp=fields["mlp_norm"],
        # The MLP of timm's attention pooling has no gate.
        swiglu_mlp=fields["mlp"] == "swiglu" and fields["pooling"] != "map",
        use_post_norm=fields["post_norm"],
        init_values=fields["layer_scale"],
        attn_only_layer_scale=not fields.get("mlp_layer_scale", True),
    )
    if fields["num_kv_heads"] != fields["num_heads"]:
        args |= {"num_kv_heads": fields["num_kv_heads"], "qkv_fused": False, "attn_type": "rope"}
    if fields["pooling"] == "map":
        args["attn_pool_num_heads"] = fields["map_heads"]
        args["attn_pool_mlp_ratio"] = ratio(fields["map_mlp_dim"], fields["width"])
    return args | (_rotary(fields) if position in _ROTARY else {})


_ROTARY = {"rope": "cat", "rope_dinov3": "dinov3", "rope_mixed": "mixed"}


def _rotary(fields: Args) -> Args:
    grid = fields.get("rope_grid")
    return {
        "use_rot_pos_emb": True,
        "rope_type": _ROTARY[fields["position"]],
        **_only(
            # Mixed positions are of interleaved pairs alone.
            rope_rotate_half=not (fields["rope_interleaved"] or fields["position"] == "rope_mixed"),
            rope_temperature=fields.get("rope_base"),
            ref_feat_shape=list(grid) if grid else None,
            rope_grid_offset=fields.get("rope_offset"),
            rope_grid_indexing="xy" if fields.get("rope_columns_first", True) else None,
        ),
    }


def _beit(fields: Args) -> Args:
    return {
        "use_abs_pos_emb": fields["has_table"],
        "use_fc_norm": fields["fc_norm"],
        **_only(
            use_rel_pos_bias=fields["position_bias"] == "table",
            use_shared_rel_pos_bias=fields["position_bias"] == "shared_table",
            swiglu_mlp=fields["mlp"] == "swiglu",
            scale_mlp=fields["mlp_norm"],
            init_values=fields["layer_scale"],
        ),
    }


def _relative(fields: Args) -> Args:
    bias = str(fields["position_bias"])
    args = {
        "act_layer": fields.get("activation", "gelu"),
        "class_token": fields["class_token"],
        "fc_norm": fields["fc_norm"],
        "rel_pos_type": "mlp" if bias.endswith("mlp") else "bias",
        "init_values": fields["layer_scale"],
        **_only(
            qk_norm=fields["qk_norm"],
            shared_rel_pos=bias.startswith("shared"),
            block_fn="ResPostRelPosBlock" if fields["post_norm"] else None,
        ),
    }
    return args | ({"rel_pos_dim": fields["position_bias_dim"]} if bias.endswith("mlp") else {})


def _written(key: str, value: Any, module: str) -> str:
    """Returns an argument as Python has it."""
    if key == "norm_layer":
        kind, _, epsilon = value.rstrip(")").partition("(")
        return f"functools.partial(timm.layers.{kind}, eps={epsilon})"
    if key == "act_layer":
        return f"timm.layers.get_act_layer({value!r})"
    if key == "block_fn":
        return f"timm.models.{module}.{value}"
    return repr(tuple(value) if isinstance(value, list) else value)


TARGETS = (
    Target(
        name="Eva",
        module="eva",
        expresses=_COMMON | _GATED | _OF_EVA,
        args=_eva,
        state=_timm_states.of_eva,
    ),
    Target(
        name="Beit",
        module="beit",
        expresses=_COMMON | _GATED | _TABLES,
        args=_beit,
        state=_timm_states.of_beit,
        class_row=True,
    ),
    Target(
        name="VisionTransformer",
        module="vision_transformer",
        expresses=(_COMMON | _OF_VIT | _OF_BLOCKS) - {"no bias of keys"},
        args=_vit,
        state=_timm_states.of_vit,
    ),
    Target(
        name="VisionTransformerDistilled",
        module="deit",
        expresses=(_COMMON | {"a distillation token", "query-key norm", "quick GELU", "SiLU"})
        - {"no bias of keys", "no positions", "mean pooling", "an unread class token"},
        args=_distilled,
        state=_timm_states.of_distilled,
        class_row=True,
    ),
    Target(
        name="VisionTransformerRelPos",
        module="vision_transformer_relpos",
        expresses=(_COMMON | _TABLES | _OF_RELPOS) - {"no bias of keys"},
        args=_relative,
        state=_timm_states.of_relpos,
    ),
)
