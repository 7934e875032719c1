"""The models of timm by their names: which model of this package each of them is.

The table `timm_names.json` has the arguments that timm's factories pass to its classes;
`scripts/timm_names.py` writes it from the package. A name may be that of an architecture
(`vit_base_patch16_224`) or of pretrained weights (`vit_base_patch16_224.augreg_in21k`), with or
without `timm/` before it.
"""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any, NoReturn

from vit_jax.errors import UserError

Args = Mapping[str, Any]

NORMS = {"layernorm": "layernorm", "rmsnorm": "rmsnorm"}
ACTIVATIONS = {
    **{"gelu": "gelu", "gelutanh": "gelu_tanh", "quickgelu": "quick_gelu"},
    **{"silu": "silu", "swish": "silu"},
}
"""The fields by timm's words and the names of its classes, both without case and underscores."""

STEM = {"stem_variance_epsilon": 1e-8, "stem_norm_epsilon": 1e-5}
"""The epsilons of the ResNets in timm's hybrids."""

MIXERS = {("MixerBlock", "LayerNorm(1e-06)"), ("ResBlock", "Affine")}
"""The blocks of timm's Mixers with their norms."""

BLOCKS = ("Block", "ResPostBlock", "ParallelScalingBlock", "DiffParallelScalingBlock")
DIFFERENTIAL = ("diff", "diffattention")
POOLINGS = {"token": "token", "avg": "mean", "map": "map", "": "none"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """A model of timm, as a model of this package.

    name: the model's name here. fields: those of the model that timm's arguments tell.
    image_size: the side of the images, or (height, width), and num_classes: the length of the
      logits, of the pretrained weights; None for an architecture alone.
    args: timm's arguments.
    """

    name: str
    fields: Mapping[str, Any]
    args: Args
    image_size: int | tuple[int, int] | None = None
    num_classes: int | None = None


@functools.cache
def table() -> Mapping[str, Any]:
    """Returns the table: by architecture the class, the arguments and the pretrained tags."""
    text = resources.files("vit_jax.models").joinpath("timm_names.json").read_text()
    return json.loads(text)["models"]


def nearest(name: str) -> str:
    """Returns the name of timm that `name` is nearly; "" if there is none."""
    names = [*table()]
    names += [f"{one}.{tag}" for one, row in table().items() for tag in row["tags"]]
    return next(iter(difflib.get_close_matches(name.removeprefix("timm/"), names, 1, 0.85)), "")


def find(name: str, args: Args | None = None) -> Origin | None:
    """Returns the model that timm's `name` stands for, or None if timm has no such name.

    args: arguments that replace those of timm's factory.

    Raises:
      UserError: the model has layers that this package has not.
    """
    architecture, _, tag = name.removeprefix("timm/").partition(".")
    row = table().get(architecture)
    if row is None or (tag and tag not in row["tags"]):
        return None
    given = {**row["args"], **(args or {})}
    kind, fields = convert(row["class"], given, name)
    size, classes, _ = row["tags"][tag] if tag else (None, None, "")
    return Origin(kind, fields, given, size, classes)


def convert(timm_class: str, args: Args, name: str = "") -> tuple[str, dict[str, Any]]:
    """Returns the model of this package, and its fields, of a class of timm with arguments.

    name: that of the model, for messages; the class's otherwise.

    Raises:
      UserError: the model has layers that this package has not.
    """
    name, read_fields = name or timm_class, _CLASSES.get(timm_class)
    if read_fields is None:
        raise UserError(f"{name}: timm's {timm_class} is no model of this package")
    told = _Told(args)
    kind, fields = read_fields(told, f"{name}: ")
    unread = sorted(k for k, v in args.items() if v is not None and k not in told.read | _IDLE)
    if unread:
        _refuse(f"{name}: ", f"{unread[0]}={args[unread[0]]!r:.100}")
    return kind, fields


class _Told(dict[str, Any]):
    """Arguments that note which of them are read, so that none is passed over by mistake."""

    def __init__(self, args: Args):
        super().__init__(args)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)


def _refuse(name: str, what: str) -> NoReturn:
    raise UserError(f"{name}this package has no {what}, which timm's model has")


def _norm(value: str | None, name: str) -> dict[str, Any]:
    """Returns the fields of a norm such as `LayerNorm(1e-05)`; 1e-6 is the default epsilon."""
    match = re.fullmatch(r"(\w+?)(?:\((.*)\))?", value or "LayerNorm")
    kind = NORMS.get(_plain(match[1])) if match else None
    if match is None or kind is None:
        _refuse(name, f"norm {value}")
    return {"norm": kind, "norm_epsilon": float(match[2] or 1e-6)}


def _activation(a: Args, name: str) -> str:
    given = a.get("act_layer") or "GELU"
    return ACTIVATIONS.get(_plain(given)) or _refuse(name, f"activation {given}")


def _plain(word: str) -> str:
    return str(word).lower().replace("_", "")


def _sizes(a: Args, name: str, pooling: str) -> dict[str, Any]:
    """Returns the fields that all of timm's classes of transformers have in common."""
    width, ratio = a.get("embed_dim", 768), a.get("mlp_ratio", 4.0)
    fields = {
        "patch_size": _patch(a.get("patch_size", 16)),
        "width": width,
        "depth": a.get("depth", 12),
        "num_heads": a.get("num_heads", 12),
        "mlp_dim": int(width * ratio),
        "activation": _activation(a, name),
        "qkv_bias": a.get("qkv_bias", True),
        "qk_norm": a.get("qk_norm", False),
    }
    pool = a.get("global_pool", pooling)
    if pool not in POOLINGS:
        _refuse(name, f"pooling {pool!r}")
    fields["pooling"] = POOLINGS[pool]
    if a.get("init_values"):
        fields["layer_scale"] = a["init_values"]
    return fields | _norm(a.get("norm_layer"), name)


def _patch(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _norms_around(a: Args, pool: str, *, last: Any, after: Any) -> dict[str, bool]:
    """Returns which norms come after the blocks and after the pooling."""
    fc_norm = pool == "mean" if after is None else bool(after)
    return {"last_norm": (not fc_norm) if last is None else bool(last), "fc_norm": fc_norm}


def _vit(a: Args, name: str) -> tuple[str, dict[str, Any]]:
    """Returns the fields of timm's `VisionTransformer`."""
    fields, kind = _sizes(a, name, "token"), "vit"
    pre_norm, bias = a.get("pre_norm", False), a.get("proj_bias", True)
    block, mlp = a.get("block_fn", "Block"), a.get("mlp_layer", "Mlp")
    attention = a.get("attn_layer") or "attn"
    if block not in BLOCKS or _plain(attention) not in ("attn", "attention", *DIFFERENTIAL):
        _refuse(name, f"{attention} {block}")
    final = a.get("final_norm", True)
    norms = _norms_around(a, fields["pooling"], last=None, after=a.get("fc_norm"))
    fields |= norms if final else {"last_norm": False, "fc_norm": False}
    fields |= {
        "class_token": a.get("class_token", True),
        "class_token_position": not a.get("no_embed_class", False) and not a.get("reg_tokens"),
        "num_registers": a.get("reg_tokens", 0),
        "position": "none" if a.get("pos_embed", "learn") in ("", "none") else "learned",
        "patch_bias": not pre_norm,
        "pre_norm": pre_norm,
        "embed_norm": bool(a.get("embed_norm_layer")),
        "proj_bias": bias,
        "mlp_bias": bias,
        "attention_norm": a.get("scale_attn_norm", False),
        "mlp_norm": a.get("scale_mlp_norm", False),
        "post_norm": block == "ResPostBlock",
        "parallel": block.endswith("ParallelScalingBlock"),
        "differential": block.startswith("Diff") or _plain(attention) in DIFFERENTIAL,
        "pool_prefix": a.get("pool_include_prefix", False),
    }
    fields |= _gated(fields, mlp, name)
    if fields["post_norm"]:
        fields.pop("layer_scale", None)
    if "embed_layer" in a and fields["patch_size"] is not None:
        kind, more = _hybrid(a, name)
        fields |= more
    return kind, fields


def _gated(fields: Mapping[str, Any], mlp: str, name: str) -> dict[str, Any]:
    if mlp == "Mlp":
        return {}
    if mlp == "SwiGLUPacked":
        return {"mlp": "swiglu", "mlp_dim": fields["mlp_dim"] // 2}
    if mlp == "SwiGLU":
        return {"mlp": "swiglu"}
    _refuse(name, f"MLP {mlp}")


def _hybrid(a: Args, name: str) -> tuple[str, dict[str, Any]]:
    layer = a["embed_layer"]
    backbone = layer.get("backbone", {}) if isinstance(layer, dict) else {}
    if layer == "PatchEmbed" or (isinstance(layer, dict) and layer["name"] == "PatchEmbed"):
        return "vit", {}
    if backbone.get("name") == "ConvStem" and not layer.get("proj", True):
        return "conv_stem_b16", {"patch_size": 2}
    if backbone.get("name") not in ("Sequential",):
        _refuse(name, f"stem {backbone.get('name') or layer}")
    patch = layer.get("patch_size", a.get("patch_size", 1))
    return "r50_b16", {"stages": tuple(backbone["stages"]), "patch_size": _patch(patch), **STEM}


def _distilled(a: Args, name: str) -> tuple[str, dict[str, Any]]:
    kind, fields = _vit(a, name)
    return kind, fields | {"distill_token": True}


def _eva(a: Args, name: str) -> tuple[str, dict[str, Any]]:
    """Returns the fields of timm's `Eva`."""
    fields, pre_norm = _sizes(a, name, "avg"), a.get("use_pre_transformer_norm", False)
    norms = {"last": a.get("use_post_transformer_norm"), "after": a.get("use_fc_norm")}
    fields |= _norms_around(a, fields["pooling"], **norms)
    heads = a.get("num_kv_heads")
    if isinstance(heads, list):
        # Blocks that differ have a key for every query here; files have theirs repeated.
        heads = heads[0] if len(set(heads)) == 1 else None
    registers, table = a.get("num_reg_tokens", 0), a.get("use_abs_pos_emb", True)
    fields |= {
        "class_token": a.get("class_token", True),
        "class_token_position": not a.get("no_embed_class", False) and not registers and table,
        "num_registers": registers,
        "position": "learned" if table else "none",
        "patch_bias": not pre_norm,
        "pre_norm": pre_norm,
        "key_bias": a.get("attn_type", "eva") == "rope",
        "num_kv_heads": None if heads == fields["num_heads"] else heads,
        "attention_norm": a.get("scale_attn_inner", False),
        "mlp_norm": a.get("scale_mlp", False),
        "mlp": "swiglu" if a.get("swiglu_mlp") else "gelu",
        "activation": "gelu",
        "post_norm": a.get("use_post_norm", False),
        "mlp_layer_scale": not a.get("attn_only_layer_scale", False),
        "pool_prefix": fields["pooling"] == "map",
    }
    if fields["mlp"] == "swiglu" and (align := a.get("swiglu_align_to")):
        fields["mlp_dim"] += -fields["mlp_dim"] % align
    if fields["pooling"] == "map":
        ratio = a.get("attn_pool_mlp_ratio") or a.get("mlp_ratio", 4.0)
        fields["map_heads"] = a.get("attn_pool_num_heads") or fields["num_heads"]
        fields["map_mlp_dim"] = int(fields["width"] * ratio)
    if fields["post_norm"]:
        fields.pop("layer_scale", None)
    if a.get("use_rot_pos_emb"):
        fields |= _rotary(a, name)
    return "vit", fields


def _rotary(a: Args, name: str) -> dict[str, Any]:
    kind = a.get("rope_type", "cat")
    kinds = {"cat": "rope", "dinov3": "rope_dinov3", "mixed": "rope_mixed"}
    if kind not in kinds:
        _refuse(name, f"rotary positions {kind!r}")
    fields: dict[str, Any] = {
        "position": kinds[kind],
        "position_table": a.get("use_abs_pos_emb", True),
        "rope_interleaved": not a.get("rope_rotate_half", False),
    }
    if kind == "mixed" and a.get("rope_grid_indexing", "ij") != "xy":
        _refuse(name, "mixed rotary positions that start with rows")
    if kind != "mixed":
        grid = a.get("ref_feat_shape") if kind == "cat" else None
        fields |= {
            "rope_base": float(a.get("rope_temperature", 10_000.0)),
            "rope_grid": (grid, grid) if isinstance(grid, int) else grid and tuple(grid),
            "rope_offset": a.get("rope_grid_offset", 0.0),
            "rope_columns_first": a.get("rope_grid_indexing", "ij") == "xy",
        }
    return fields


def _beit(a: Args, name: str) -> tuple[str, dict[str, Any]]:
    """Returns the fields of timm's `Beit`."""
    fields = _sizes(a, name, "avg")
    table = a.get("use_abs_pos_emb", True)
    fields |= _norms_around(a, fields["pooling"], last=None, after=a.get("use_fc_norm"))
    fields |= {
        "class_token": True,
        "class_token_position": table,
        "position": "learned" if table else "none",
        "key_bias": False,
        "mlp": "swiglu" if a.get("swiglu_mlp") else "gelu",
        "mlp_norm": a.get("scale_mlp", False),
    }
    if a.get("use_rel_pos_bias"):
        fields["position_bias"] = "table"
    if a.get("use_shared_rel_pos_bias"):
        fields["position_bias"] = "shared_table"
    return "vit", fields


def _relative(a: Args, name: str) -> tuple[str, dict[str, Any]]:
    """Returns the fields of timm's `VisionTransformerRelPos`."""
    fields = _sizes(a, name, "avg")
    if "init_values" not in a:
        fields["layer_scale"] = 1e-6
    fc_norm, has_token = a.get("fc_norm", False), a.get("class_token", False)
    post_norm = a.get("block_fn") == "ResPostRelPosBlock"
    if "swin" in a.get("rel_pos_type", "mlp"):
        _refuse(name, "bias of positions as in Swin V2")
    kind = "mlp" if a.get("rel_pos_type", "mlp").startswith("mlp") else "table"
    fields |= {
        "last_norm": not fc_norm,
        "fc_norm": fc_norm,
        "class_token": has_token,
        "class_token_position": False,
        "position": "none",
        "post_norm": post_norm,
        "position_bias": f"shared_{kind}" if a.get("shared_rel_pos") else kind,
    }
    if post_norm:
        fields.pop("layer_scale", None)
    return "vit", fields


def _naflex(a: Args, name: str) -> tuple[str, dict[str, Any]]:
    """Returns the fields of timm's `NaFlexVit` for images of one size."""
    fields = _sizes(a, name, "map")
    if a.get("rope_type") or a.get("pos_embed", "learned") not in ("learned", "factorized"):
        _refuse(name, f"positions {a.get('rope_type') or a.get('pos_embed')!r}")
    if a.get("attn_type") or a.get("attn_layer") or a.get("block_fn"):
        _refuse(name, "such blocks")
    pre_norm, final = a.get("pre_norm", False), a.get("final_norm", True)
    norms = _norms_around(a, fields["pooling"], last=None, after=a.get("fc_norm"))
    fields |= norms if final else {"last_norm": False, "fc_norm": False}
    fields |= {
        "class_token": a.get("class_token", False),
        "class_token_position": False,
        "num_registers": a.get("reg_tokens", 0),
        "position": "learned",
        "pre_norm": pre_norm,
        "patch_bias": a.get("proj_bias", True) if not pre_norm else False,
        "proj_bias": a.get("proj_bias", True),
        "mlp_bias": a.get("proj_bias", True),
        "attention_norm": a.get("scale_attn_norm") or a.get("scale_attn_inner_norm") or False,
        "mlp_norm": a.get("scale_mlp_norm", False),
        "pool_prefix": a.get("pool_include_prefix", False),
    }
    return "vit", fields | _gated(fields, a.get("mlp_layer", "Mlp"), name)


def _mixer(a: Args, name: str) -> tuple[str, dict[str, Any]]:
    """Returns the fields of timm's `MlpMixer`."""
    _check_average(a, name)
    block = a.get("block_layer", "MixerBlock")
    block, values = (block["name"], block["init_values"]) if isinstance(block, dict) else (block, 0)
    norm = a.get("norm_layer") or ("Affine" if block == "ResBlock" else "LayerNorm(1e-06)")
    if (block, norm) not in MIXERS or a.get("mlp_layer", "Mlp") != "Mlp":
        _refuse(name, f"{block} with {a.get('mlp_layer')}")
    width, res = a.get("embed_dim", 512), block == "ResBlock"
    ratio = a.get("mlp_ratio", 4.0 if res else (0.5, 4.0))
    ratios = ratio if isinstance(ratio, list | tuple) else (ratio, ratio)
    fields = {
        "patch_size": _patch(a.get("patch_size", 16)),
        "width": width,
        "depth": a.get("num_blocks", 8),
        "tokens_mlp_dim": 0 if res else int(ratios[0] * width),
        "channels_mlp_dim": int(ratios[1] * width),
        "activation": _activation(a, name),
    }
    if res:
        fields |= {"norm": "affine", "layer_scale": values or 1e-4}
    return "mixer_b16", fields


def _check_average(a: Args, name: str) -> None:
    if a.get("global_pool", "avg") != "avg":
        _refuse(name, f"pooling {a['global_pool']!r}")


def _bit(a: Args, name: str) -> tuple[str, dict[str, Any]]:
    _check_average(a, name)
    return "bit_r50x1", {"stages": tuple(a["layers"]), "width_factor": a.get("width_factor", 1)}


_IDLE = frozenset(
    (
        *("img_size", "in_chans", "num_classes", "dynamic_img_size", "dynamic_img_pad", "layers"),
        *("strict_img_size", "qkv_fused", "weight_init", "fix_init", "head_init_scale", "device"),
        *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
        *("drop_path_rate", "rope_rescale_coords", "rope_shift_coords", "rope_jitter_coords"),
        # The format of timm's files reads how positions are resized; arrays show the other sizes.
        *(f"pos_embed_{part}" for part in ("grid_size", "interp_mode", "ar_preserving")),
        *(f"pos_embed_{part}" for part in ("antialias", "align_corners", "use_grid_sample")),
        *("rel_pos_dim", "enable_patch_interpolator", "stem_type", "conv_layer", "dtype"),
        # What mixed rotary positions do not have.
        "rope_temperature",
    )
)
"""Arguments of timm's models that change no field, or training alone."""

_CLASSES = {
    "VisionTransformer": _vit,
    "VisionTransformerDistilled": _distilled,
    "VisionTransformerRelPos": _relative,
    "Eva": _eva,
    "Beit": _beit,
    "NaFlexVit": _naflex,
    "MlpMixer": _mixer,
    "ResNetV2": _bit,
}
