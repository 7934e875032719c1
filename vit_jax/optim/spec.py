"""Every key of `config.optim`, its default and its meaning; no other key is accepted."""

from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError, nearest

DEFAULTS: dict[str, Any] = {
    # The update rule: a file of `optim/rules` (adamw, nadamw, sgd, adafactor, lamb, muon,
    # schedule_free_adamw), what optax calls `scale_by_NAME` (lion, radam, adan, adopt, …), or
    # `package.module:function`.
    "name": "adamw",
    # The rule's own settings, for example {"b2": 0.95, "mu_dtype": "bfloat16"}: the arguments of
    # its function, and nothing else.
    "args": {},
    # Base learning rate: what the schedule multiplies.
    "lr": 1e-3,
    # Strength of decoupled weight decay.
    "weight_decay": 0.0,
    # What the decay is multiplied by besides the schedule. "lr": also the learning rate and its
    # multipliers, as in optax and PyTorch, w -= lr·schedule·(u + decay·w). "schedule": nothing
    # else, as in big_vision and in Loshchilov & Hutter (2019), w -= schedule·(lr·u + decay·w);
    # there a decay of 1e-4 at lr 1e-3 is what "lr" calls 0.1.
    "decay_coupling": "lr",
    # Regular expression for the whole name of the parameters that decay.
    "decay_mask": ".*/kernel",
    # [[regex, multiple of weight_decay], …]; the first match wins, unmatched parameters have 1.
    "decay_mults": [],
    # Largest global norm of the gradient, frozen parameters left out; 0 is off.
    "clip_norm": 0.0,
    "schedule": {
        # cosine, linear, rsqrt, constant, stair, or `package.module:function`.
        "name": "cosine",
        # Duration of the linear ramp from 0 at the start and to 0 at the end.
        "warmup": 0,
        "cooldown": 0,
        # Multiplier at the end of cosine and linear.
        "end": 0.0,
        # Duration over which rsqrt falls to 1/sqrt(2).
        "timescale": 10_000,
        # stair: multiplier factors[i] from boundaries[i] (durations since the start) on.
        "boundaries": [],
        "factors": [],
    },
    # [[regex, schedule], …] for parameters with another schedule than the one above; keys as
    # above, the first match wins. The logged learning rate is the main schedule's.
    "group_schedules": [],
    # [[regex, multiplier of lr], …]; the first match wins, unmatched parameters have 1.
    "lr_mults": [],
    # [regex, …]: parameters that keep their value, without optimizer state.
    "freeze": [],
    # Layer-wise learning-rate decay: each block's rate is this times the next one's (Clark et al.,
    # 2020, "ELECTRA"; Bao et al., 2022, "BEiT": 0.65 to 0.75 for fine-tuning). 1 is off.
    "layer_decay": 1.0,
    # Names of the parameters of the repeated blocks, for layer_decay, muon and lamb. The group is
    # the block's number; where it is missing the blocks are stacked along the first axis.
    "blocks": r"(?:.*/)?blocks(?:_(\d+))?/.*",
    # Names of the parameters before the first block, the lowest layer of layer_decay; what is
    # neither here nor in a block comes after the last one.
    "stem": r"(?:.*/)?(?:(?:patch_embed|stem)/.*|token_embed|pos_embed|cls|registers)",
}


# Keys of a schedule that hold a length of time, in any unit the config knows.
DURATIONS = ("warmup", "cooldown", "timescale", "boundaries")


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` over `DEFAULTS`, in plain dicts and lists; unknown keys, impossible values raise."""
    spec = _merge(DEFAULTS, _plain(config), "config.optim")
    spec["group_schedules"] = [
        [pattern, _merge(DEFAULTS["schedule"], schedule, f"config.optim.group_schedules[{i}]")]
        for i, (pattern, schedule) in enumerate(_pairs(spec, "group_schedules"))
    ]
    for key in ("lr_mults", "decay_mults"):
        spec[key] = _pairs(spec, key)
        for pattern, multiplier in spec[key]:
            if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
                raise UserError(
                    f"config.optim.{key}: a number is needed for {pattern!r}, got {multiplier!r}"
                )
    for key in ("lr", "weight_decay", "clip_norm"):
        if not spec[key] >= 0:
            raise UserError(f"config.optim.{key}: must not be negative, got {spec[key]}")
    if not 0 < spec["layer_decay"] <= 1:
        raise UserError(
            f"config.optim.layer_decay: {spec['layer_decay']} is not in (0, 1]; 1 is off"
        )
    couplings = ("lr", "schedule")
    if spec["decay_coupling"] not in couplings:
        hint = nearest(spec["decay_coupling"], couplings)
        raise UserError(f"config.optim.decay_coupling: unknown {spec['decay_coupling']!r}; {hint}")
    return spec


def _merge(defaults: Mapping[str, Any], given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: a mapping is needed, got {given!r}")
    for key in given:
        if key not in defaults:
            raise UserError(f"{where}.{key}: unknown key; {nearest(str(key), defaults)}")
    for key, value in given.items():
        _check_type(value, key, defaults[key], f"{where}.{key}")
    merged = {**defaults, **given}
    if "schedule" in defaults:
        merged["schedule"] = _merge(defaults["schedule"], merged["schedule"], f"{where}.schedule")
    return merged


def _check_type(value: Any, key: str, default: Any, where: str) -> None:
    """Raises unless `value` is of the kind of `default`; lengths of time may be strings too."""
    kind = next(kind for kind in (Mapping, list, str, (int, float)) if isinstance(default, kind))
    words = {Mapping: "a mapping", list: "a list", str: "a string", (int, float): "a number"}
    if key in DURATIONS and isinstance(value, str):
        return
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {words[kind]} is needed, got {value!r}")


def _pairs(spec: Mapping[str, Any], key: str) -> list[list[Any]]:
    pairs = [list(pair) if isinstance(pair, list) else [pair] for pair in spec[key]]
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(f"config.optim.{key}: entries are [regex, value], got {pair}")
    return pairs


def _plain(value: Any) -> Any:
    """Mappings of any kind (`ConfigDict` is no `Mapping`) as dicts, sequences as lists."""
    if hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
