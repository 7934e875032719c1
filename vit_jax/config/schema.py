"""Every config key: its default, its meaning, its range, and what may change on resume.

Durations (`total`, `log.every`, `optim.schedule.warmup`, ...) are an int (steps) or a text with a
unit: `"90 epochs"`, `"10_000 steps"`, `"1_000_000 examples"`, `"5 percent"` (of `total`).

Open sections (`model`, `task`, `optim.args`, `data.args`) take keys that their owner checks: the
fields of the model or task that `name` selects, the arguments of the optimizer or the source.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config.key import (
    FIXED,
    FREE,
    WARNED,
    Key,
    duration,
    open_section,
    patterns,
    place,
)
from vit_jax.config.optim_keys import OPTIM

SCHEMA: dict[str, Any] = {
    "seed": Key(
        0,
        FIXED,
        "Root of every random key and of the order of the data.",
        at_least=0,
        at_most=2**32 - 1,
    ),
    "total": duration("90 epochs", WARNED, "Length of training.", above=0),
    "batch_size": Key(
        1024,
        FIXED,
        "Number of examples in a step, over all devices and processes.",
        at_least=1,
    ),
    "accum_steps": Key(
        1,
        WARNED,
        "Number of micro-batches whose gradients are averaged into one step.",
        at_least=1,
    ),
    "max_skipped_steps": Key(
        0,
        FREE,
        "Number of non-finite steps in a row that are skipped before the run stops.",
        at_least=0,
    ),
    "spikes": {
        "factor": Key(
            0.0,
            WARNED,
            "A step is skipped if its loss exceeds this multiple of the recent average; 0 switches"
            " the guard off.",
            above=1,
            also=(0,),
        ),
        "window": Key(
            100,
            WARNED,
            "Number of steps in that average. No step is skipped before as many have passed.",
            at_least=1,
        ),
        "max_skipped": Key(
            10, FREE, "Number of spikes in a row that are skipped before the run stops.", at_least=0
        ),
    },
    "ema_decay": Key(
        0.0,
        WARNED,
        "Decay of the exponential moving average of the parameters; 0 switches it off.",
        at_least=0,
        below=1,
    ),
    "precision": Key(
        "default",
        WARNED,
        "Precision of float32 matrix products: default, high or highest.",
        choices=("default", "high", "highest"),
    ),
    "model": open_section(
        {"name": "vit_s16"},
        FIXED,
        "The `name` of a model and any of its fields.",
        patch_size=WARNED,  # Where parameters depend on it, their shapes refuse it.
        remat=FREE,
        unroll=FREE,
        attention=FREE,
        dtype=WARNED,
        dropout=WARNED,
        attention_dropout=WARNED,
        drop_path=WARNED,
        patch_drop=WARNED,
        initialization=FREE,
        head_zero_init=FREE,
    ),
    "task": open_section(
        {"name": "classification"},
        WARNED,
        "The `name` of a task and any of its fields. `lora` = {rank, targets} trains low-rank"
        " adapters (the backbone below them is then frozen, unless optim.freeze says otherwise).",
        name=FIXED,
        lora=FIXED,
    ),
    "init": {
        "checkpoint": place(
            "",
            FIXED,
            "File or workdir, in any format, that training starts from; empty starts at random.",
        ),
        "head": Key(
            "auto",
            FIXED,
            "Use of the classifier in the checkpoint: auto (kept if it fits), keep or zero.",
            choices=("auto", "keep", "zero"),
        ),
        "interpolation": Key(
            "auto",
            FREE,  # Only the first state depends on it, and its default has changed.
            "Resizing of its position embeddings: auto (as its own codebase does it), corners (as"
            " vision_transformer), bilinear, bicubic, or torch_bilinear and torch_bicubic (as"
            " transformers).",
            choices=("auto", "corners", "bilinear", "bicubic", "torch_bilinear", "torch_bicubic"),
        ),
        "source_grid": Key(
            [],
            FIXED,
            "[rows, columns] of its position embeddings; empty takes what the checkpoint says, or a"
            " square.",
            of=int,
            at_least=1,
        ),
        "initialize": patterns(
            FIXED, "[regex, ...]: parameters that start anew.", aliases=("initialise",)
        ),
        "ignore": patterns(FIXED, "[regex, ...]: arrays of the checkpoint that are left out."),
    },
    "data": {
        "source": Key(
            "tfds",
            FIXED,
            "Where examples come from: tfds, folder, table, webdataset, idx, npz,"
            " segmentation_folder, coco, captions, fake, or package.module:Class.",
        ),
        "name": place("imagenet2012", FIXED, "Name of the TFDS dataset; or the folder or file."),
        "dir": place("", FREE, "Folder of prepared TFDS datasets; empty is TFDS's own default."),
        "split": place("train", FIXED, "Training split, such as train[:99%]."),
        "pp": Key(
            "",
            WARNED,
            "Preprocessing of training images: ops joined by |. Ops of your own are"
            " package.module:function.",
        ),
        "eval_pp": Key("", FREE, "Preprocessing of evaluation images."),
        # Hoffer et al. (2020); DeiT and DeiT III have 3.
        "repeats": Key(
            1,
            FIXED,
            "Number of differently augmented copies of each example in its batch.",
            at_least=1,
        ),
        "args": open_section({}, FIXED, "Further arguments of the source."),
        "balance": Key(
            0.0,
            FIXED,
            "Power of the rarity of a class by which its training examples are repeated: 0 leaves"
            " them as they are, 1 makes all classes equally frequent.",
            at_least=0,
            at_most=1,
        ),
        "on_bad_image": Key(
            "fail",
            WARNED,
            "What happens at an unreadable training image: fail, or skip (another takes its"
            " place).",
            choices=("fail", "skip"),
        ),
        "threads": Key(
            0, FREE, "Number of decoding threads; 0 means one for each core.", at_least=0
        ),
        "prefetch": Key(
            2, FREE, "Number of batches kept ready on the host and on the device.", at_least=0
        ),
        "timeout": Key(
            600.0, FREE, "Seconds that a source may be silent before the run stops.", above=0
        ),
    },
    "eval": {
        "every": duration(
            "10 percent", FREE, "Time between evaluations; one more follows the last step."
        ),
        "batch_size": Key(
            0, FREE, "Number of examples in a step; 0 means that of training.", at_least=0
        ),
        "sets": open_section(
            {"val": {"split": "validation"}},
            FREE,
            "name -> {split, and source, name, dir, pp or args if they differ from data's}.",
        ),
        "probes": open_section(
            {},
            FREE,
            "Measures of frozen features at every evaluation, for any task: {split} with labels,"
            " which the classifiers know, and neighbors ([20]), shots ([]), linear (true), l2"
            " (1024); source, name, dir, pp or args if they differ from data's. Empty has none.",
        ),
    },
    "stop": {
        "metric": Key(
            "",
            FREE,
            "Metric whose end of improvement ends the run, such as val/accuracy; empty trains to"
            " total.",
        ),
        "patience": Key(
            0,
            FREE,
            "Number of evaluations in a row without a better value of stop.metric that end the"
            " run.",
            at_least=0,
        ),
    },
    "optim": OPTIM,
    "stages": open_section(
        {},
        WARNED,
        "name -> {until, and keys of model, task, data, optim, ...}: settings that hold until that"
        " time of the run. After the last of them the config itself holds.",
    ),
    "mesh": {
        "data": Key(
            -1,
            FREE,
            "Number of devices over which only the batch is split; -1 means all that are left.",
            at_least=1,
            also=(-1,),
        ),
        "fsdp": Key(
            1,
            FREE,
            "Number of devices over which batch, parameters and optimizer state are split.",
            at_least=1,
            also=(-1,),
        ),
        "tensor": Key(
            1,
            FREE,
            "Number of devices over which attention heads and MLPs are split.",
            at_least=1,
            also=(-1,),
        ),
        "zero1": Key(
            False, FREE, "Splits optimizer state and moving average over `data`, too (ZeRO-1)."
        ),
    },
    "checkpoint": {
        "every": duration(
            "10 percent", FREE, "Time between checkpoints; one more follows the last step."
        ),
        "keep_last": Key(2, FREE, "Number of newest checkpoints that are kept.", at_least=1),
        "retries": Key(
            3, FREE, "Number of times in a row that a failed save is tried again.", at_least=0
        ),
        "keep_best": Key(
            "", FREE, "Metric whose best checkpoint is kept, too, such as val/accuracy."
        ),
        "best_is": Key(
            "",
            FREE,
            "The best value of keep_best: highest or lowest; empty means as the task declares.",
            choices=("", "highest", "lowest"),
        ),
    },
    "log": {
        "every": duration("1 percent", FREE, "Time between rows of metrics."),
        "writers": Key(
            ["jsonl", "tensorboard"],
            FREE,
            "Where rows of metrics go besides metrics.jsonl: tensorboard, wandb, or"
            " package.module:Class.",
            of=str,
        ),
        "tensorboard": Key(True, FREE, "false leaves tensorboard out of log.writers."),
        "pictures": Key(
            True,
            FREE,
            "Draws predictions and attention at the end, which gathers all parameters.",
        ),
    },
    "compilation_cache": place(
        "~/.cache/vit_jax/xla", FREE, "Folder of compiled programs; empty switches the cache off."
    ),
}

PROBES = {
    "neighbors": Key([20], FREE, "Numbers of nearest neighbors that vote.", of=int, at_least=1),
    "shots": Key([], FREE, "Numbers of examples per class of few-shot probes.", of=int, at_least=1),
    "linear": Key(True, FREE, "Least squares on all examples."),
    "l2": Key(1024.0, FREE, "Strength of the regularization of least squares.", above=0),
    "rates": Key(
        [],
        FREE,
        "Learning rates, for a batch of 256, of linear classifiers that SGD trains all at once; the"
        " best one counts. Empty trains none.",
        of=float,
        above=0,
    ),
    "epochs": Key(10, FREE, "Passes of SGD over the known images.", at_least=1),
    "blocks": Key(
        [1],
        FREE,
        "Numbers of last blocks whose tokens are joined, one set of classifiers for each.",
        of=int,
        at_least=1,
    ),
    "average": Key(False, FREE, "SGD's features have the mean patch of the last block, too."),
    "batch_norm": Key(False, FREE, "SGD's features are normalized by the batch, as MAE does it."),
}
"""The keys of `eval.probes` besides those of a set."""

EVAL_SET_KEYS = ("split", "source", "name", "dir", "pp", "args")


def walk(schema: Mapping, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Key]]:
    """Yields every key of a schema with its path."""
    for name, entry in schema.items():
        if isinstance(entry, Key):
            yield (*prefix, name), entry
        else:
            yield from walk(entry, (*prefix, name))


def find(path: str) -> Key | None:
    """Returns the key that a dotted path leads to or into; None where there is none."""
    entry: Any = SCHEMA
    for name in path.split("."):
        if isinstance(entry, dict):
            entry = entry.get(name)
    return entry if isinstance(entry, Key) else None


ALIASES: Mapping[str, str] = {
    ".".join((*path[:-1], alias)): ".".join(path)
    for path, key in walk(SCHEMA)
    for alias in key.aliases
}
"""The path of each key that was renamed, by its earlier paths."""


def defaults(schema: Mapping) -> dict:
    """Returns the keys of a schema at their defaults, nested as it is."""
    return {
        name: copy.deepcopy(entry.default) if isinstance(entry, Key) else defaults(entry)
        for name, entry in schema.items()
    }


def section_defaults(name: str) -> dict[str, Any]:
    """Returns the keys of a top-level section at their defaults."""
    return defaults(SCHEMA[name])


def lock(config: ConfigDict) -> ConfigDict:
    """Locks all sections of a config but the open ones; returns the config."""
    config.lock()
    for path, key in walk(SCHEMA):
        section: Any = config
        for name in path:
            section = section.get(name) if isinstance(section, ConfigDict) else None
        if key.kind == "open" and isinstance(section, ConfigDict):
            section.unlock()
    return config
