"""The facts about a model that other code may ask for, so that none looks at its class or fields.

A backbone answers by a method `traits()` of its own. Without one it is described by the name of
its class, for which no checkpoint format of another codebase has a place. A subclass without one
has the traits of its base class under its own name, since it may compute something else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from vit_jax.models.layers.positions import ROPE_BASE

PLAIN = frozenset(
    (
        *("width", "depth", "num_heads", "mlp_dim", "tokens_mlp_dim", "channels_mlp_dim"),
        *("patch_size", "class_token", "class_token_position", "vocab_size", "max_length"),
        *("stages", "width_factor", "global_blocks", "position_bias_dim"),
        *("position_grid", "position_resize_offset", "position_resize_antialias"),
        *(
            "patch_drop",
            "drop_path",
            "constant_drop_path",
            "drop_path_exact",
            "dropout",
            "attention_dropout",
        ),
        "initialization",
        *("scan", "unroll", "remat", "attention", "dtype", "residual_dtype"),
    )
)
"""Fields of backbones that change sizes or training, or that another trait tells of."""


VIT_NAMES: Mapping[str, str | Mapping[Any, str]] = {
    "pooling": {
        "token": "class token",
        "mean": "mean pooling",
        "token_mean": "pooling of class token and mean",
        "map": "attention pooling",
        "none": "no pooling",
    },
    "pool_prefix": "pooling of all tokens",
    "map_dim": "attention pooling of another size",
    "map_heads": "attention pooling of another size",
    "map_mlp_dim": "attention pooling of another size",
    "map_mlp": "attention pooling without an MLP",
    "position": {
        "learned": "",
        "none": "no positions",
        "sincos2d": "sin-cos positions",
        "sincos2d_mae": "sin-cos positions of MAE",
    },
    "position_table": "learned positions beside rotary ones",
    "position_bias": {"none": ""},
    "block_positions": "positions in every block",
    "rope_base": "a base of rotary positions",
    "rope_grid": "a reference grid of rotary positions",
    "rope_offset": "an offset of rotary positions",
    "rope_columns_first": "rotary positions that start with columns",
    "rope_interleaved": "rotary positions in interleaved pairs",
    "patch_bias": "no bias of patches",
    "embed_norm": "a norm of patches",
    "pre_norm": "a norm before the blocks",
    "last_norm": "no last norm",
    "fc_norm": "a norm after pooling",
    "norm": {"layernorm": "", "rmsnorm": "RMSNorm"},
    "norm_epsilon": "another norm epsilon",
    "mlp": {"gelu": "", "swiglu": "SwiGLU"},
    "activation": {
        "gelu_tanh": "",
        "gelu": "exact GELU",
        "quick_gelu": "quick GELU",
        "silu": "SiLU",
    },
    "qkv_bias": "no biases of queries, keys and values",
    "key_bias": "no bias of keys",
    "proj_bias": "no bias after attention",
    "mlp_bias": "no biases in the MLP",
    "num_kv_heads": "grouped-query attention",
    "num_registers": "registers",
    "layer_scale": "LayerScale",
    "mlp_layer_scale": "LayerScale on attention alone",
    "qk_norm": "query-key norm",
    "differential": "differential attention",
    "attention_norm": "a norm inside attention",
    "mlp_norm": "a norm inside the MLP",
    "post_norm": "post-norm blocks",
    "parallel": "parallel blocks",
    "distill_token": "a distillation token",
    "window": "attention within windows",
}
"""The traits of a ViT by its fields, for `named_fields`; checkpoint formats list these names."""


@dataclasses.dataclass(frozen=True)
class Traits:
    """An account of a model.

    kind: the family, such as "a ViT", as messages put it.
    has_stem: other layers come before the patches, such as convolutions.
    named: whatever else tells the model from the plainest of its family, such as "registers".
    reads_text: inputs are token ids, not images.
    position: the kind of positions, as the field of `VisionTransformer` has it.
    class_token_position: a learned table of positions has a row for the class token.
    table_grid: (rows, columns) for which learned positions are kept, whatever the image size; None
      where the table follows the image size.
    """

    kind: str
    named: frozenset[str] = frozenset()
    reads_text: bool = False
    position: str = "none"
    class_token_position: bool = False
    table_grid: tuple[int, int] | None = None
    has_stem: bool = False

    @property
    def all_named(self) -> frozenset[str]:
        """Everything that a checkpoint format must have a place for."""
        return self.named | {self.kind}

    def but(self, *named: str, **fields: Any) -> "Traits":
        """Returns these traits with more of them named, and fields replaced."""
        return dataclasses.replace(self, named=self.named | {*named}, **fields)


def fields_of(backbone: nn.Module) -> dict[str, Any]:
    """Returns the fields of a backbone by their names."""
    fields = [f.name for f in dataclasses.fields(backbone) if f.init]
    return {name: getattr(backbone, name) for name in fields if name not in ("parent", "name")}


def effective_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields with their defaults written out, without those that change nothing.

    ViTs whose fields are equal in this form compute the same with the same arrays. The fields of
    other backbones come back as they are.
    """
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    if not {"class_token", "position_bias"} <= found.keys():
        return found
    pooling, position, idle = str(found["pooling"]), str(found["position"]), []
    if found["class_token"] is None:
        found["class_token"] = pooling in ("token", "token_mean")
    defaults = {
        "num_kv_heads": found["num_heads"],
        "mlp_dim": 4 * found["width"],
        "map_dim": found["width"],
        "map_heads": found["num_heads"],
        "map_mlp_dim": found["mlp_dim"] or 4 * found["width"],
        "rope_base": ROPE_BASE,
    }
    found |= {name: value for name, value in defaults.items() if found[name] is None}
    if position not in ("rope", "rope_dinov3"):
        idle += ["rope_base", "rope_grid", "rope_offset", "rope_columns_first"]
    if not position.startswith("rope"):
        idle += ["rope_interleaved", "position_table"]
    if not (found["class_token"] and (position == "learned" or found["position_table"])):
        idle.append("class_token_position")
    if pooling != "map":
        idle += ["map_dim", "map_heads", "map_mlp_dim", "map_mlp"]
    has_prefix = found["class_token"] or found["distill_token"] or found["num_registers"]
    if pooling in ("token", "none") or not has_prefix:
        idle.append("pool_prefix")
    if found["mlp"] == "swiglu":
        idle.append("activation")
    if not found["qkv_bias"]:
        idle.append("key_bias")
    if not str(found["position_bias"]).endswith("mlp"):
        idle.append("position_bias_dim")
    if found["layer_scale"] is None:
        idle.append("mlp_layer_scale")
    return {name: value for name, value in found.items() if name not in idle}


def traits_of(model: nn.Module) -> Traits:
    """Returns the traits of a backbone, or those of a model with a head and of its backbone."""
    kind = type(model)
    if "traits" in vars(kind):
        return model.traits()
    if has_head(model):
        return traits_of(model.backbone).but(f"the head of a {kind.__name__}")
    inherited = model.traits() if hasattr(model, "traits") else Traits("")
    return inherited.but(kind=f"a {kind.__name__}")


def has_head(model: nn.Module) -> bool:
    """Returns whether `model` is a backbone, in its field `backbone`, with a head on it."""
    return hasattr(model, "backbone")


def backbone_of(model: nn.Module) -> nn.Module:
    """Returns the backbone below a head, or the model itself."""
    return model.backbone if has_head(model) else model


def text_tower_of(model: nn.Module) -> nn.Module | None:
    """Returns the text tower of an image-text model; None for other models."""
    return getattr(model, "text", None)


def named_fields(
    module: nn.Module, owner: type, names: Mapping[str, str | Mapping[Any, str]] | None = None
) -> set[str]:
    """Returns names for the fields of `owner` that tell `module` from the plainest model.

    A field that is in neither `names` nor `PLAIN`, and a value that `names` does not list, is named
    as `field=value`: what is new in a model is never taken for something known.

    names: for each field, the name of any value but the default, or of each value; "" for none.
    """
    found = set()
    for field in dataclasses.fields(owner):
        if not field.init or field.name in ("parent", "name", *PLAIN):
            continue
        value, name = getattr(module, field.name), (names or {}).get(field.name)
        if isinstance(name, Mapping):
            found.add(name.get(value, f"{field.name}={value!r}"))
        elif value != field.default:
            found.add(name or f"{field.name}={value!r}")
    return found - {""}
