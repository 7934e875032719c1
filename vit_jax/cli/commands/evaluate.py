"""`evaluate`: prints exact metrics of a checkpoint on whole splits."""

import argparse

from vit_jax.cli.arguments import (
    add_cluster,
    add_config,
    add_step,
    add_trust,
    check_one_of,
    load_config,
    out_file,
    refuse,
    set_up,
)
from vit_jax.cli.parser import Command
from vit_jax.errors import UserError, show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "the model", "Give --workdir for a run, or --config and --checkpoint for any checkpoint."
    )
    group.add_argument("--workdir", metavar="DIR", help="A run that was trained.")
    add_step(group)
    add_config(
        group,
        "With --checkpoint: the config that names the data, the model and the task, with"
        " arguments after a colon.",
    )
    group.add_argument("--checkpoint", metavar="PATH", help="A checkpoint in any format.")
    parser.add_argument(
        "--json", type=out_file, metavar="FILE", help="Also write the metrics to FILE, as JSON."
    )
    add_trust(parser)
    add_cluster(parser)


def _run(arguments: argparse.Namespace) -> None:
    check_one_of(arguments, "workdir", "checkpoint")
    from vit_jax.storage import json_text, write_output
    from vit_jax.training import evaluate
    from vit_jax.training.workdir import Workdir

    if arguments.checkpoint:
        refuse(arguments, "step", beside="checkpoint")
        if not arguments.config:
            raise UserError("evaluate: --checkpoint needs --config=FILE, which names the data")
        config = load_config(arguments)
        set_up(config, arguments)
        results = evaluate.evaluate_checkpoint(config, arguments.checkpoint)
    else:
        refuse(arguments, "config", beside="workdir")
        workdir = Workdir.existing(arguments.workdir)
        set_up(workdir.read_config(arguments.overrides), arguments)
        results = evaluate.evaluate_workdir(workdir, arguments.overrides, arguments.step)
    for name, value in results.items():
        show(f"{name:32} {value:.6g}")
    import jax

    if arguments.json and jax.process_index() == 0:
        write_output(arguments.json, json_text(results, indent=2) + "\n")


COMMAND = Command(
    summary="Print exact metrics of a checkpoint on the evaluation splits of its config.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "evaluate --workdir=runs/digits --json=metrics.json",
        "evaluate --config=configs/finetune.py:vit_b16 --checkpoint=B_16.npz",
    ),
    overrides=("config",),
)
