"""Writes vit_jax/models/timm_names.json: the models of timm by their names, as data.

    python scripts/timm_names.py            # needs the extra `interop`

For every architecture of timm that is a Vision Transformer, a Mixer, a BiT or a hybrid, the table
has the class, the arguments that its factory passes, and for each pretrained tag the image size,
the number of classes and the license that timm states. `vit_jax.models.timm_names` turns them into
fields.
"""

import functools
import json
import pathlib
from typing import Any
from unittest import mock

import timm
import torch
from timm.layers import GluMlp, get_act_layer, get_norm_layer

MODULES = (
    *("vision_transformer", "eva", "deit", "beit", "vision_transformer_hybrid", "mlp_mixer"),
    *("resnetv2", "naflexvit", "vision_transformer_relpos", "vision_transformer_sam", "cait"),
)
# Arguments that change the training alone, or that any model takes.
LEFT_OUT = frozenset(
    (
        *("weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "head_init_scale"),
        *("pretrained_cfg_overlay", "pretrained_filter_fn", "pretrained_strict", "feature_cfg"),
        *("pretrained_custom_load", "use_fused_attn", "pretrained_model_args", "strict_img_size"),
        *("zero_init_last", "drop_path_rate", "enable_patch_interpolator"),
    )
)
PATH = pathlib.Path(__file__).parents[1] / "vit_jax" / "models" / "timm_names.json"


class Captured(Exception):
    """Carries the class and the arguments that a factory is about to use."""


def capture(cls: type, variant: str, pretrained: bool = False, **arguments: Any) -> None:
    raise Captured(cls, arguments)


def norm(layer: Any) -> str:
    """Returns a norm as its name with its epsilon."""
    made = get_norm_layer(layer)(8)
    kind = type(made).__name__.replace("Fp32", "")
    return f"{kind}({made.eps:g})" if hasattr(made, "eps") else kind


def module_of(value: torch.nn.Module) -> dict[str, Any]:
    """Returns a convolutional stem as its kind and the units of its stages."""
    kind = type(getattr(value, "stem", None) or value).__name__
    return {"name": kind, "stages": [len(stage.blocks) for stage in getattr(value, "stages", ())]}


def partial(value: functools.partial) -> Any:
    """Returns a layer with arguments as its name and these arguments."""
    if value.func is GluMlp:
        return "GluMlp" if value.keywords.get("gate_last", True) else "SwiGLUPacked"
    inner = {k: described(k, v) for k, v in value.keywords.items()}
    return {"name": value.func.__name__, **inner}


def described(key: str, value: Any) -> Any:
    """Returns an argument as JSON has it: layers by their names."""
    if value is None or isinstance(value, bool | int | float):
        found = value
    elif key in ("norm_layer", "embed_norm_layer"):
        found = norm(value)
    elif key == "act_layer":
        found = get_act_layer(value).__name__
    elif isinstance(value, list | tuple):
        found = [described("", entry) for entry in value]
    elif isinstance(value, functools.partial):
        found = partial(value)
    elif isinstance(value, torch.nn.Module):
        found = module_of(value)
    elif hasattr(value, "__dataclass_fields__"):
        found = changed(value)
    else:
        found = value if isinstance(value, str) else value.__name__
    return found


def changed(config: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass that are not at their defaults."""
    fields = config.__dataclass_fields__
    values = {k: v for k, v in vars(config).items() if v != fields[k].default}
    return {k: described(k, v) for k, v in values.items() if k not in LEFT_OUT}


def architecture(name: str, module: str) -> dict[str, Any]:
    """Returns the class of a model and the arguments of its factory."""
    source = getattr(timm.models, module)
    try:
        with mock.patch.object(source, "build_model_with_cfg", capture):
            timm.create_model(name, pretrained=False)
    except Captured as caught:
        cls, arguments = caught.args
    kept = {k: v for k, v in arguments.items() if k not in LEFT_OUT and v is not None}
    args = {k: described(k, v) for k, v in kept.items()}
    return {"class": cls.__name__, "args": args | args.pop("cfg", {})}


def tags(names: list[str]) -> dict[str, list[int | str]]:
    """Returns [image size, classes, license] of every pretrained tag of one architecture."""
    found = {}
    for name in names:
        config = timm.get_pretrained_cfg(name)
        found[name.partition(".")[2]] = [
            config.input_size[-1],
            config.num_classes,
            config.license or "",
        ]
    return found


def main() -> None:
    pretrained = timm.list_models(pretrained=True)
    models = {}
    for module in MODULES:
        for name in timm.list_models(module=module, exclude_filters="resnetv2*"):
            models[name] = module
    bits = [n.partition(".")[0] for n in pretrained if n.startswith("resnetv2") and "bit" in n]
    models |= dict.fromkeys(bits, "resnetv2")
    table = {}
    for name, module in sorted(models.items()):
        names = [n for n in pretrained if n.partition(".")[0] == name]
        if names:
            table[name] = {**architecture(name, module), "tags": tags(names)}
    compact = functools.partial(json.dumps, separators=(",", ":"))
    text = ",\n".join(f"{json.dumps(name)}: {compact(row)}" for name, row in table.items())
    PATH.write_text(f'{{"timm": "{timm.__version__}", "models": {{\n{text}\n}}}}\n')
    names = sum(len(row["tags"]) for row in table.values())
    print(f"{PATH}: {len(table)} architectures, {names} names, {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
