"""`train`: trains a model, or resumes the run that the workdir holds."""

import argparse
import time

from vit_jax.cli.arguments import (
    add_cluster,
    add_config,
    add_trust,
    count,
    load_config,
    set_up,
)
from vit_jax.cli.parser import Command
from vit_jax.errors import UserError, program

_STARTED = time.monotonic()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="The folder that keeps the run: config, metrics, checkpoints and report. It may be"
        " on an object store, such as gs://BUCKET/run. Required.",
    )
    parser.add_argument(
        "--keys",
        action="store_true",
        help="Only list every config key: its default, its meaning, and what changing it does to"
        " a run that is resumed.",
    )
    parser.add_argument(
        "--restarts",
        action="store",  # Launchers add theirs to what the user wrote, and the last one counts.
        type=count,
        default=0,
        metavar="N",
        help="Start the run again, up to N times in a row, if it is interrupted or loses one of"
        " its processes (default: %(default)s).",
    )
    parser.add_argument(
        "--profile",
        default="",
        metavar="START:STOP",
        help="Write a trace of the steps START to STOP into WORKDIR/profile, for XProf.",
    )
    add_trust(parser)
    add_cluster(parser)


def _run(arguments: argparse.Namespace) -> int | None:
    if arguments.keys:
        from vit_jax import config as config_lib

        print(config_lib.describe())
        return None
    for flag in ("config", "workdir"):
        if not getattr(arguments, flag):
            raise UserError(f"train: --{flag} is missing (see {program()} train --help)")
    if arguments.restarts:
        from vit_jax.launch import supervise

        return supervise.run([*arguments.given, "--restarts=0"], arguments.restarts)
    config = load_config(arguments)
    from vit_jax.training import loop

    set_up(config, arguments)
    outcome = loop.train(
        config,
        arguments.workdir,
        profile=arguments.profile,
        started=_STARTED,
        command=("python", "-m", "vit_jax", *arguments.given),
    )
    import jax

    if jax.process_index() == 0:
        print(outcome.describe())
    return None


COMMAND = Command(
    summary="Train a model, or resume the run that the workdir holds.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "train --config=configs/digits.py --workdir=runs/digits",
        "train --config=configs/folder.py:photos --workdir=runs/photos --config.optim.lr=3e-4",
        "train --keys",
    ),
    overrides=("config",),
)
