"""Every config key: its default, its unit, and what may change on resume.

Durations (`total`, `log.every`, `optim.schedule.warmup`, ...) are an int (steps) or a string with
a unit: `"90 epochs"`, `"10_000 steps"`, `"1_000_000 examples"`, `"5 percent"` (of `total`).

Sections marked open (`model`, `task`, `optim.args`, `data.args`) take keys that their owner checks:
the fields of the model or task that `name` selects, the arguments of the optimizer or source.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

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
        r"(?:.*/)?(?:(?:patch_embed|stem|embed_norm)/.*|(?:token|segment|pos)_embed|cls|distill"
        r"|registers)",
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
        "source_grid": Key(
            [], FIXED, "[rows, columns] of its positions; empty = as it tells, or a square"
        ),
        "initialise": Key([], FIXED, "[regex, ...]: parameters that start anew"),
        "ignore": Key([], FIXED, "[regex, ...]: arrays of the file that are left out"),
    },
    "data": {
        "source": Key(
            "tfds",
            FIXED,
            "tfds, folder, npz, segmentation_folder, coco, captions, fake or package.module:Class",
        ),
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
        "best_is": Key(
            "", FREE, "value of keep_best to keep: highest or lowest; empty = as the task declares"
        ),
    },
    "log": {
        "every": _duration("1 percent", FREE, "between rows of metrics"),
        "writers": Key(
            ["jsonl", "tensorboard"],
            FREE,
            "where rows of metrics go besides metrics.jsonl: tensorboard, or package.module:Class",
        ),
        "tensorboard": Key(True, FREE, "false leaves tensorboard out of log.writers"),
        "pictures": Key(
            True, FREE, "draw predictions and attention at the end; gathers all parameters"
        ),
    },
    "compilation_cache": Key(
        "~/.cache/vit_jax/xla", FREE, "folder of compiled programs; empty = no cache"
    ),
}

EVAL_SET_KEYS = ("split", "source", "name", "dir", "pp", "args")


def walk(schema: Mapping, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Key]]:
    """Every key of a schema with its path."""
    for name, entry in schema.items():
        if isinstance(entry, Key):
            yield (*prefix, name), entry
        else:
            yield from walk(entry, (*prefix, name))


def defaults(schema: Mapping) -> dict:
    """A schema's keys at their defaults, nested as it is."""
    return {
        name: entry.default if isinstance(entry, Key) else defaults(entry)
        for name, entry in schema.items()
    }


def section_defaults(name: str) -> dict[str, Any]:
    """The keys of a top-level section at their defaults."""
    return defaults(SCHEMA[name])
