"""Types and groups of flags that several commands share, each with what it is turned into."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax import plugins
from vit_jax.errors import UserError, quoted

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from vit_jax.inference.predict import Predictor

Flags = argparse.ArgumentParser | argparse._ArgumentGroup
"""A parser, or a group of its flags, to which flags can be added."""


def add_config(parser: Flags, text: str = "", *, required: bool = False) -> None:
    """Adds --config. text: what the config is for, if not for the run itself."""
    parser.add_argument(
        "--config",
        metavar="NAME[:ARGS]",
        required=required,
        help=text
        or "The config of the run: a file, or the name of a recipe that ships with the package."
        " Arguments follow a colon, as in finetune:vit_b16. Required.",
    )


def load_config(arguments: argparse.Namespace) -> "ConfigDict":
    """Returns the config of --config, with the overrides of the command line."""
    from vit_jax import config

    return config.load(arguments.config, arguments.overrides)


def add_trust(parser: Flags) -> None:
    """Adds --trust, which names the code that a stored config may run."""
    parser.add_argument(
        "--trust",
        type=_foreign_names,
        default=(),
        metavar="NAME[,NAME]",
        help="Code from outside this package, as package.module:name, that may run although only"
        " the stored config of a workdir names it. Anything else of that kind is refused.",
    )


def _foreign_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if not plugins.FOREIGN.fullmatch(name):
            raise argparse.ArgumentTypeError(
                f"{name!r} is no name of code; write package.module:name"
            )
    return names


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that tell the processes of one run where to meet."""
    group = parser.add_argument_group(
        "one run in several processes",
        "On Cloud TPU, GKE, SLURM and Open MPI the processes find each other. Elsewhere give all\n"
        "three flags to every process.",
    )
    group.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="Address of process 0."
    )
    group.add_argument(
        "--num-processes", type=int, default=0, metavar="N", help="Number of processes."
    )
    group.add_argument(
        "--process-id",
        type=int,
        default=-1,
        metavar="I",
        help="Number of this process, from 0 to N - 1.",
    )


def set_up(config: "ConfigDict", arguments: argparse.Namespace) -> None:
    """Joins the cluster, if there is one, and sets JAX up as the config asks."""
    from vit_jax.parallel import processes

    cluster = processes.Cluster()
    if hasattr(arguments, "coordinator"):
        cluster = processes.Cluster(
            arguments.coordinator, arguments.num_processes, arguments.process_id
        )
    processes.setup(config.compilation_cache, config.precision, cluster)


def add_model_source(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a trained model: --workdir, or --checkpoint and what it needs."""
    group = parser.add_argument_group("the model", "Give --workdir or --checkpoint.")
    group.add_argument(
        "--workdir", metavar="DIR", help="A run that was trained; its newest checkpoint is used."
    )
    group.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="A checkpoint in any format: a workdir, an .npz of vision_transformer or big_vision,"
        " a timm file, or a transformers folder.",
    )
    add_model_details(group)


def add_model_details(parser: Flags) -> None:
    """Adds the flags that tell more about a workdir or a checkpoint."""
    add_step(parser)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="The name of the model of a checkpoint, needed only if the checkpoint does not"
        " tell it.",
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="SIZE",
        help="The size in pixels that images are resized to for a checkpoint, such as 224, or"
        " 192x256 (height x width). Default: the size that the checkpoint was trained at.",
    )
    add_trust(parser)


def add_step(parser: Flags) -> None:
    """Adds --step, which chooses a checkpoint of a workdir."""
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N",
        help="The step of a workdir whose checkpoint is used, or best, for the one that"
        " config.checkpoint.keep_best kept (default: the newest).",
    )


def _step(text: str) -> str:
    if text != "best" and not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no step; write a number, or best")
    return text


def open_predictor(arguments: argparse.Namespace, *, headless: bool = False) -> "Predictor":
    """Returns the `Predictor` of the model that the flags of `add_model_source` name.

    headless: accept a checkpoint without a classifier head.
    """
    check_one_of(arguments, "workdir", "checkpoint")
    from vit_jax import config
    from vit_jax.inference import predict

    if arguments.workdir:
        refuse(arguments, "model", "image-size", "labels", beside="workdir")
        if arguments.fields:
            raise UserError(f"{arguments.command}: --model.FIELD does not go with --workdir")
        texts = getattr(arguments, "text", ())
        return predict.Predictor.from_workdir(arguments.workdir, texts, step=arguments.step)
    refuse(arguments, "step", beside="checkpoint")
    if getattr(arguments, "text", ()):
        refuse(arguments, "labels", beside="text")
    return predict.Predictor.from_checkpoint(
        arguments.checkpoint,
        model=arguments.model,
        fields=config.parse_values(arguments.fields),
        image_size=arguments.image_size,
        labels=getattr(arguments, "labels", None),
        texts=getattr(arguments, "text", ()),
        headless=headless,
    )


def check_one_of(arguments: argparse.Namespace, *flags: str) -> None:
    """Raises a `UserError` unless exactly one of the flags was given."""
    if sum(bool(getattr(arguments, flag)) for flag in flags) != 1:
        names = " or ".join(f"--{flag}" for flag in flags)
        raise UserError(f"{arguments.command}: give {names} (one of them)")


def refuse(arguments: argparse.Namespace, *flags: str, beside: str) -> None:
    """Raises a `UserError` for a flag that `--{beside}` would leave without effect."""
    for flag in flags:
        if getattr(arguments, flag.replace("-", "_"), None):
            raise UserError(f"{arguments.command}: --{flag} does not go with --{beside}")


def out_file(text: str) -> str:
    """Returns the name of a file that can be written.

    A mistyped folder is reported before the work begins, not after hours of it.
    """
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        reason = "that is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise argparse.ArgumentTypeError(f"cannot write {text}: {reason}")
    return text


def results_file(text: str) -> str:
    """Returns the name of a CSV, JSON-lines or Parquet file that can be written."""
    out_file(text)
    if not text.lower().endswith((".csv", ".jsonl", ".parquet")):
        raise argparse.ArgumentTypeError(f"{text}: results are written as .csv, .jsonl or .parquet")
    return text


def png_file(text: str) -> str:
    """Returns the name of a PNG file that can be written."""
    out_file(text)
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} is written as a PNG: name it so, as in out.png")
    return text


def positive(text: str) -> int:
    """Returns a whole number of at least 1."""
    return _whole(text, least=1)


def count(text: str) -> int:
    """Returns a whole number of at least 0."""
    return _whole(text, least=0)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no number from {least} on, below 10^9")
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """Returns `224` or `192x256` as (height, width)."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no size; write 224, or 192x256")
    return int(match[1]), int(match[2] or match[1])
