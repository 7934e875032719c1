"""`report`: writes the HTML report of a run again."""

import argparse

from vit_jax.cli.parser import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", metavar="DIR", required=True, help="A run, finished or not. Required."
    )


def _run(arguments: argparse.Namespace) -> None:
    from vit_jax.report import write_report
    from vit_jax.training.workdir import Workdir

    print(write_report(Workdir.existing(arguments.workdir).path))


COMMAND = Command(
    summary="Write the HTML report of a run again, from its own logs.",
    run=_run,
    add_arguments=_add_arguments,
    examples=("report --workdir=runs/digits",),
)
