"""The configuration: every key with its default, its unit, and what may change on resume.

A config file is Python: `get_config(arg)` starts from `default_config()`, sets keys and returns it.
`load` reads the file, applies `--config.key=value` overrides and validates; what comes out is
locked and complete, so that no later code needs a default of its own.

Durations (`total`, `log.every`, `optim.schedule.warmup`, ...) are an int (steps) or a string with
a unit: `"90 epochs"`, `"10_000 steps"`, `"1_000_000 examples"`, `"5 percent"` (of `total`).

Sections marked open (`model`, `task`, `optim.args`, `data.args`) take keys that their owner checks:
the fields of the model or task that `name` selects, the arguments of the optimizer or source.
"""

import ast
import difflib
import functools
import importlib.util
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax.errors import UserError, nearest

VERSION = 1
"""Version of `config.json`; `MIGRATIONS[v]` turns a stored config of version v into v + 1."""

MIGRATIONS: dict[int, Callable[[dict], dict]] = {}

FREE, WARNED, FIXED = "free", "warned", "fixed"


@dataclass(frozen=True)
class Key:
    """One config key.

    default: the value if no config sets it; its type is the key's type.
    on_resume: what a changed value does to a workdir that has a checkpoint: "free" is silent,
      "warned" resumes and says what changed, "fixed" refuses.
    kind: "plain"; "duration" (int or string with a unit); "open" (a section checked by its owner).
    exceptions: for open sections, keys whose `on_resume` differs from the section's.
    """

    default: Any
    on_resume: str
    doc: str
    kind: str = "plain"
    exceptions: Mapping[str, str] = field(default_factory=dict)


def _duration(default: int | str, on_resume: str, doc: str) -> Key:
    return Key(default, on_resume, doc, kind="duration")


def _open(default: dict, on_resume: str, doc: str, **exceptions: str) -> Key:
    return Key(default, on_resume, doc, kind="open", exceptions=exceptions)


_SCHEDULE = {
    "name": Key("cosine", WARNED, "cosine, linear, rsqrt, constant, stair or package.module:name"),
    "warmup": _duration(0, WARNED, "linear ramp from 0 at the start"),
    "cooldown": _duration(0, WARNED, "linear ramp to 0 at the end"),
    "end": Key(0.0, WARNED, "multiplier at the end of cosine and linear"),
    "timescale": _duration(10_000, WARNED, "over which rsqrt falls to 1/sqrt(2)"),
    "boundaries": Key([], WARNED, "stair: durations since the start"),
    "factors": Key([], WARNED, "stair: multiplier from each boundary on"),
}

_OPTIM = {
    "name": Key(
        "adamw",
        FIXED,
        "a file of optim/rules (adamw, sgd, adafactor, lamb, muon, ...), what optax calls"
        " scale_by_NAME (lion, radam, ...), or package.module:function",
    ),
    "args": _open({}, WARNED, "the rule's own arguments, such as b2 or mu_dtype"),
    "lr": Key(1e-3, WARNED, "base learning rate: what the schedule multiplies"),
    "weight_decay": Key(0.0, WARNED, "strength of decoupled weight decay"),
    # "lr": w -= lr·schedule·(u + decay·w), as in optax and PyTorch. "schedule": big_vision's and
    # Loshchilov & Hutter's (2019) w -= schedule·(lr·u + decay·w), where a decay of 1e-4 at lr 1e-3
    # is what "lr" calls 0.1.
    "decay_coupling": Key("lr", WARNED, "what scales the decay besides the schedule: lr, schedule"),
    "decay_mask": Key(".*/kernel", WARNED, "regex for the whole name of parameters that decay"),
    "decay_mults": Key([], WARNED, "[[regex, multiple of weight_decay], ...]; first match wins"),
    "clip_norm": Key(0.0, WARNED, "largest global norm of the gradient; 0 = off"),
    # Foret et al. (2021); Chen et al. (2022, arXiv:2106.01548) give 0.1 to 0.2 for ViTs.
    "sam_rho": Key(
        0.0,
        WARNED,
        "radius of sharpness-aware minimisation, at twice the cost of a step; 0 = off",
    ),
    "schedule": _SCHEDULE,
    "group_schedules": Key([], WARNED, "[[regex, schedule], ...] for parameters with another one"),
    "lr_mults": Key([], WARNED, "[[regex, multiplier of lr], ...]; first match wins"),
    "freeze": Key([], WARNED, "[regex, ...]: parameters that keep their value"),
    # Clark et al. (2020, ELECTRA), Bao et al. (2022, BEiT): 0.65 to 0.75 for fine-tuning.
    "layer_decay": Key(1.0, WARNED, "each block's rate is this times the next one's; 1 = off"),
    "blocks": Key(
        r"(?:.*/)?blocks(?:_(\d+))?/.*",
        WARNED,
        "regex of parameters in the repeated blocks; its group is the block's number, and where"
        " that is missing the blocks are stacked along the first axis",
    ),
    "stem": Key(
        r"(?:.*/)?(?:(?:patch_embed|stem)/.*|token_embed|pos_embed|cls|registers)",
        WARNED,
        "regex of parameters before the first block, the lowest layer of layer_decay",
    ),
}


SCHEMA: dict[str, Any] = {
    "seed": Key(0, FIXED, "root of every random key and of the order of the data"),
    "total": _duration("90 epochs", WARNED, "length of training"),
    "batch_size": Key(1024, FIXED, "examples a step, over all devices and processes"),
    "accum_steps": Key(1, WARNED, "micro-batches whose gradients are averaged into one step"),
    "max_skipped_steps": Key(
        0, FREE, "non-finite steps in a row that are skipped before the run stops"
    ),
    "spikes": {
        "factor": Key(
            0.0, WARNED, "skip a step whose loss exceeds this times its recent average; 0 = off"
        ),
        "window": Key(100, WARNED, "steps of that average; none is skipped before as many"),
        "max_skipped": Key(10, FREE, "spikes in a row that are skipped before the run stops"),
    },
    "ema_decay": Key(0.0, WARNED, "decay of the exponential moving average of parameters; 0 = off"),
    "precision": Key(
        "default", WARNED, "matmul precision of float32 products: default, high or highest"
    ),
    "model": _open(
        {"name": "vit_s16"},
        FIXED,
        "`name` and any field of that model",
        remat=FREE,
        unroll=FREE,
        attention=FREE,
        dtype=WARNED,
        dropout=WARNED,
        attention_dropout=WARNED,
        drop_path=WARNED,
        patch_drop=WARNED,
    ),
    "task": _open(
        {"name": "classification"},
        WARNED,
        "`name` and the task's fields; `lora` = {rank, targets} trains low-rank adapters"
        " (optim.freeze, if empty, then freezes the backbone below them)",
        name=FIXED,
        lora=FIXED,
    ),
    "init": {
        "checkpoint": Key(
            "", FIXED, "file or workdir, of any format, that training starts from; empty = random"
        ),
        "head": Key("auto", FIXED, "its classifier: auto (kept where it fits), keep or zero"),
        "interpolation": Key(
            "corners", FIXED, "of its positions: corners (as published), bilinear or bicubic"
        ),
        "initialise": Key([], FIXED, "[regex, ...]: parameters that start anew"),
        "ignore": Key([], FIXED, "[regex, ...]: arrays of the file that are left out"),
    },
    "data": {
        "source": Key("tfds", FIXED, "tfds, folder, npz, fake or package.module:Class"),
        "name": Key("imagenet2012", FIXED, "dataset name (tfds), folder or file"),
        "dir": Key("", FREE, "where prepared TFDS datasets are; empty = TFDS's own default"),
        "split": Key("train", FIXED, "training split, such as train[:99%]"),
        "pp": Key("", WARNED, "training preprocessing, ops joined by |"),
        "eval_pp": Key("", FREE, "evaluation preprocessing"),
        # Hoffer et al. (2020); DeiT and DeiT III have 3.
        "repeats": Key(1, FIXED, "differently augmented copies of an example in its batch"),
        "args": _open({}, FIXED, "arguments of the source"),
        "on_bad_image": Key("fail", WARNED, "unreadable training image: fail or skip (replaced)"),
        "threads": Key(0, FREE, "decoding threads; 0 = one a core"),
        "prefetch": Key(2, FREE, "batches kept ready on the host and on the device"),
        "timeout": Key(600.0, FREE, "seconds that a source may be silent before the run stops"),
    },
    "eval": {
        "every": _duration("10 percent", FREE, "between evaluations; one more follows the last"),
        "batch_size": Key(0, FREE, "examples a step; 0 = batch_size"),
        "sets": _open(
            {"val": {"split": "validation"}},
            FREE,
            "name -> {split, and source, name, dir, pp or args where they differ from data's}",
        ),
    },
    "optim": _OPTIM,
    "mesh": {
        "data": Key(-1, FREE, "devices over which only the batch is split; -1 = the rest"),
        "fsdp": Key(1, FREE, "devices over which batch, parameters and optimizer are split"),
        "tensor": Key(1, FREE, "devices over which heads and MLP are split"),
        "zero1": Key(False, FREE, "split optimizer state and average over `data` too (ZeRO-1)"),
    },
    "checkpoint": {
        "every": _duration("10 percent", FREE, "between saves; one more follows the last step"),
        "keep_last": Key(2, FREE, "newest checkpoints kept"),
        "retries": Key(3, FREE, "times in a row that a save which fails is tried again"),
        "keep_best": Key(
            "", FREE, "metric whose best checkpoint is kept too, such as val/accuracy"
        ),
    },
    "log": {
        "every": _duration("1 percent", FREE, "between rows of metrics"),
        "tensorboard": Key(True, FREE, "write TensorBoard events beside metrics.jsonl"),
        "pictures": Key(
            True, FREE, "draw predictions and attention at the end; gathers all parameters"
        ),
    },
    "compilation_cache": Key(
        "~/.cache/vit_jax/xla", FREE, "folder of compiled programs; empty = no cache"
    ),
}

EVAL_SET_KEYS = ("split", "source", "name", "dir", "pp", "args")


def default_config() -> ConfigDict:
    """A config with every key at its default, locked against unknown keys."""
    return _lock(ConfigDict(_defaults(SCHEMA), type_safe=False))


def _lock(config: ConfigDict) -> ConfigDict:
    """Locks all sections but the open ones."""
    config.lock()
    for path, key in _walk(SCHEMA):
        if key.kind == "open":
            functools.reduce(getattr, path, config).unlock()
    return config


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """The config that `FILE.py[:arguments]` and `--config.key=value` overrides describe.

    Raises:
      UserError: the file or its `get_config` is missing, an argument or key is unknown, or a value
        has the wrong type.
    """
    path, _, arg = spec.partition(":") if not Path(spec).exists() else (spec, "", "")
    config = _call_get_config(_import_file(path), path, arg)
    apply_overrides(config, overrides or {})
    return validate(config)


def apply_overrides(config: ConfigDict, overrides: Mapping[str, str]) -> None:
    """Sets keys, by dotted path, to the values that the texts of a command line stand for."""
    for dotted, value in parse_values(overrides).items():
        set_key(config, dotted, value)


def parse_values(texts: Mapping[str, str]) -> dict[str, Any]:
    """What texts of a command line stand for: Python literals, else the texts themselves."""
    return {key: _parse_value(text) for key, text in texts.items()}


def _import_file(path: str) -> types.ModuleType:
    if not Path(path).is_file():
        siblings = [str(p) for p in Path(path).parent.glob("*.py")]
        raise UserError(f"config {path!r}: no such file; {nearest(path, siblings)}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"config {path}:{error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config {path!r} defines no get_config(arg)")
    return module


def _call_get_config(module: types.ModuleType, path: str, arg: str) -> ConfigDict:
    try:
        return module.get_config(arg)
    except (AttributeError, KeyError) as error:
        # A locked ConfigDict names the key, and then prints itself over thirty lines.
        match = re.search(r'Key \\*"(\w+)\\*" does not exist', str(error))
        if match is None:
            raise
        names = {part for dotted, _ in flatten(_defaults(SCHEMA)) for part in dotted.split(".")}
        raise UserError(
            f"config {path!r} sets the unknown key {match[1]!r}; {nearest(match[1], names)}"
        ) from error


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """The arguments behind a config file's colon: `variant=S/16,runlocal` → a namespace.

    Values take the type of their default; a lone name sets a boolean; a lone value that is no
    name goes to the first key. (The convention of big_vision's config files.)
    """
    values = dict(defaults)
    for position, item in enumerate(filter(None, (arg or "").split(","))):
        name, equals, text = item.partition("=")
        if not equals:
            if isinstance(defaults.get(name), bool):
                text = "True"
            elif position == 0 and name not in defaults and defaults:
                name, text = next(iter(defaults)), item
        if name not in defaults:
            raise UserError(f"config argument {name!r} is unknown; {nearest(name, defaults)}")
        default = defaults[name]
        value = text if isinstance(default, str) else _parse_value(text)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if default is not None and type(value) is not type(default):
            raise UserError(
                f"config argument {name}={text!r} must be of type {type(default).__name__}"
            )
        values[name] = value
    return types.SimpleNamespace(**values)


def set_key(config: ConfigDict, dotted: str, value: Any) -> None:
    """Sets `config.a.b.c`; a key outside the schema is a `UserError` that suggests a near one."""
    *parents, last = dotted.split(".")
    section = config
    for name in parents:
        child = section.get(name)
        if not isinstance(child, ConfigDict):
            if child is None and not section.is_locked:
                child = section[name] = ConfigDict(type_safe=False)
            else:
                _unknown(config, dotted)
        section = child
    if last not in section and section.is_locked:
        _unknown(config, dotted)
    if isinstance(section.get(last), ConfigDict):
        raise UserError(f"config.{dotted} is a section; set one of its keys: {_names(section)}")
    section[last] = value


def _unknown(config: ConfigDict, dotted: str) -> None:
    known = [path for path, _ in flatten(config.to_dict())]
    close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.7)
    by_leaf = [path for path in known if path.split(".")[-1] == dotted.rsplit(".", maxsplit=1)[-1]]
    if close or by_leaf:
        raise UserError(f"config.{dotted} is unknown; did you mean config.{(close or by_leaf)[0]}?")
    raise UserError(f"config.{dotted} is unknown; sections and keys: {_names(config)}")


def _names(section: ConfigDict) -> str:
    return ", ".join(sorted(section))


def _parse_value(text: str) -> Any:
    """A Python literal where the text is one, else the text; `true` and `false` are booleans."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def validate(config: ConfigDict) -> ConfigDict:
    """`config` as a complete, locked copy.

    Raises:
      UserError: an unknown or missing key, a wrong type, or values that cannot go together.
    """
    given = config.to_dict()
    _check_section(given, SCHEMA, "")
    _check_values(given)
    result = ConfigDict(given, type_safe=False)
    result.lock()
    return result


def _check_section(given: dict, schema: Mapping[str, Any], prefix: str) -> None:
    for name in given:
        if name not in schema:
            raise UserError(f"config.{prefix}{name} is unknown; {nearest(name, schema)}")
    for name, entry in schema.items():
        dotted = prefix + name
        if name not in given:
            raise UserError(f"config.{dotted} is missing; start from vit_jax.config.default_config")
        if isinstance(entry, dict):
            if not isinstance(given[name], dict):
                raise UserError(f"config.{dotted} must be a section with keys {sorted(entry)}")
            _check_section(given[name], entry, dotted + ".")
        else:
            given[name] = _checked(given[name], entry, dotted)


def _checked(value: Any, key: Key, dotted: str) -> Any:
    expected = type(key.default)
    if key.kind == "duration":
        parse_duration(value, dotted)
        return value
    if key.kind == "open":
        if not isinstance(value, dict):
            raise UserError(f"config.{dotted} must be a section, got {value!r}")
        return value
    if key.default is None:
        return value
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected in (list, tuple) and isinstance(value, list | tuple):
        return value
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UserError(
            f"config.{dotted} must be of type {expected.__name__}, got {value!r}"
            f" ({type(value).__name__})"
        )
    return value


def _check_values(given: dict) -> None:
    """Combinations that no single key's type can rule out."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    require(given["batch_size"] > 0, f"config.batch_size={given['batch_size']} must be positive")
    require(given["accum_steps"] > 0, f"config.accum_steps={given['accum_steps']} must be positive")
    require(
        given["batch_size"] % given["accum_steps"] == 0,
        f"config.batch_size={given['batch_size']} is not divisible by"
        f" config.accum_steps={given['accum_steps']}",
    )
    require(0 <= given["ema_decay"] < 1, f"config.ema_decay={given['ema_decay']}: write 0 to 1")
    require(
        given["precision"] in ("default", "high", "highest"),
        f"config.precision={given['precision']!r}: write default, high or highest",
    )
    require(
        given["data"]["on_bad_image"] in ("fail", "skip"),
        f"config.data.on_bad_image={given['data']['on_bad_image']!r}: write fail or skip",
    )
    require(given["data"]["timeout"] > 0, "config.data.timeout must be positive")
    require(given["checkpoint"]["retries"] >= 0, "config.checkpoint.retries must not be negative")
    require(given["checkpoint"]["keep_last"] >= 1, "config.checkpoint.keep_last must be at least 1")
    require(
        given["spikes"]["factor"] == 0 or given["spikes"]["factor"] > 1,
        f"config.spikes.factor={given['spikes']['factor']}: write more than 1, or 0 for no guard",
    )
    require(given["spikes"]["window"] >= 1, "config.spikes.window must be at least 1")
    for section in ("model", "task"):
        require("name" in given[section], f"config.{section}.name is missing")
    for axis in ("data", "fsdp", "tensor"):
        size = given["mesh"][axis]
        require(size == -1 or size >= 1, f"config.mesh.{axis}={size}: write -1 or a count")
    for name, entry in given["eval"]["sets"].items():
        for key in entry:
            require(
                key in EVAL_SET_KEYS,
                f"config.eval.sets.{name}.{key} is unknown; {nearest(key, EVAL_SET_KEYS)}",
            )


_DURATION = re.compile(r"^\s*([\d_]*\.?[\d_]+(?:e\d+)?)\s*([a-z%]*)\s*$")
_UNITS = {
    "": "steps", "step": "steps", "steps": "steps", "ep": "epochs", "epoch": "epochs",
    "epochs": "epochs", "example": "examples", "examples": "examples", "%": "percent",
    "percent": "percent",
}  # fmt: skip


def parse_duration(value: int | str, name: str = "duration") -> tuple[float, str]:
    """`"90 epochs"` → `(90.0, "epochs")`; a plain int counts steps.

    Raises:
      UserError: no number, or an unknown unit.
    """
    match = _DURATION.match(str(value)) if isinstance(value, int | str) else None
    if isinstance(value, bool) or not match or match[2] not in _UNITS:
        raise UserError(
            f"config.{name}={value!r} is no duration; write steps as a number, or a string such as"
            " '90 epochs', '1000 examples', '5 percent'"
        )
    return float(match[1].replace("_", "")), _UNITS[match[2]]


@dataclass(frozen=True)
class Duration:
    """Turns durations into whole steps: rounded to the nearest, at least 1 unless zero.

    Called with an int or string. `total` is the length of training in steps.
    """

    total: int
    batch_size: int
    num_examples: int

    def __call__(self, value: int | str, name: str = "duration") -> int:
        amount, unit = parse_duration(value, name)
        steps = {
            "steps": amount,
            "epochs": amount * self.num_examples / self.batch_size,
            "examples": amount / self.batch_size,
            "percent": amount / 100 * self.total,
        }[unit]
        return max(1, round(steps)) if amount else 0


def durations(config: ConfigDict, num_examples: int) -> Duration:
    """The run's clock: `config.total` against a training split of `num_examples`."""
    _, unit = parse_duration(config.total, "total")
    if unit == "percent":
        raise UserError(f"config.total={config.total!r} cannot be a percentage of itself")
    total = Duration(0, config.batch_size, num_examples)(config.total, "total")
    return Duration(total, config.batch_size, num_examples)


def changes(old: Mapping, new: Mapping) -> dict[str, list[str]]:
    """What differs between a workdir's stored config and today's, by what it means on resume.

    Returns {"free": [...], "warned": [...], "fixed": [...]} of lines `key: old → new`.
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    found: dict[str, list[str]] = {FREE: [], WARNED: [], FIXED: []}
    for path in sorted(before.keys() | after.keys()):
        was, now = before.get(path), after.get(path)
        if was != now:
            found[_on_resume(path)].append(f"{path}: {was!r} → {now!r}")
    return found


def _on_resume(dotted: str) -> str:
    entry, names = SCHEMA, dotted.split(".")
    for position, name in enumerate(names):
        entry = entry.get(name, FIXED) if isinstance(entry, dict) else entry
        if isinstance(entry, Key):
            rest = names[position + 1 :]
            return entry.exceptions.get(rest[0], entry.on_resume) if rest else entry.on_resume
    return FIXED


def migrate(stored: dict, version: int) -> ConfigDict:
    """A stored config of an older version, brought to today's schema.

    Keys that were added since then take their defaults.

    Raises:
      UserError: the workdir was written by a newer version of this package.
    """
    if version > VERSION:
        raise UserError(
            f"the workdir's config has version {version}, this package reads up to {VERSION};"
            " update the package"
        )
    for step in range(version, VERSION):
        stored = MIGRATIONS[step](stored)
    values = _defaults(SCHEMA)
    for path, value in flatten(stored, SCHEMA):
        *parents, last = path.split(".")
        section = values
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return _lock(ConfigDict(values, type_safe=False))


def flatten(
    section: Mapping, schema: Mapping | None = None, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Leaves of a nested mapping as (dotted path, value).

    With a schema, a section that it declares open is one leaf. Tuples read as lists, as in JSON.
    """
    for name, value in section.items():
        entry = schema.get(name) if schema is not None else None
        is_open = isinstance(entry, Key) and entry.kind == "open"
        if isinstance(value, Mapping) and not is_open:
            deeper = entry if isinstance(entry, dict) else None
            yield from flatten(value, deeper, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _jsonlike(value)


def _jsonlike(value: Any) -> Any:
    return [_jsonlike(v) for v in value] if isinstance(value, list | tuple) else value


def describe() -> str:
    """Every key with its default and meaning, for `train --help`."""
    lines = []
    for path, key in _walk(SCHEMA):
        lines.append(f"  {'.'.join(path)}={key.default!r}")
        lines.append(f"      {key.doc} [on resume: {key.on_resume}]")
    return "\n".join(lines)


def _walk(schema: Mapping, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Key]]:
    for name, entry in schema.items():
        if isinstance(entry, Key):
            yield (*prefix, name), entry
        else:
            yield from _walk(entry, (*prefix, name))


def _defaults(schema: Mapping) -> dict:
    return {
        name: entry.default if isinstance(entry, Key) else _defaults(entry)
        for name, entry in schema.items()
    }


def section_defaults(name: str) -> dict[str, Any]:
    """The keys of a top-level section at their defaults."""
    return _defaults(SCHEMA[name])
