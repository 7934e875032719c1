"""`report`: writes the HTML report of a run again, or compares runs."""

import argparse

from vit_jax.cli.arguments import out_file
from vit_jax.cli.parser import Command
from vit_jax.errors import UserError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workdirs", metavar="DIR", nargs="*", help="Runs, finished or not. Several are compared."
    )
    parser.add_argument(
        "--workdir", metavar="DIR", action="append", default=[], help="The same as DIR."
    )
    parser.add_argument(
        "--out",
        type=out_file,
        metavar="FILE.html",
        help="The file for the comparison of several runs (default: comparison.html).",
    )


def _run(arguments: argparse.Namespace) -> None:
    from vit_jax.report import write_comparison, write_report
    from vit_jax.training.workdir import Workdir

    named = [*arguments.workdirs, *arguments.workdir]
    if not named:
        raise UserError("report: name a run, as in `report --workdir=runs/digits`")
    workdirs = [Workdir.existing(path).path for path in named]
    if len(workdirs) > 1:
        print(write_comparison(workdirs, arguments.out or "comparison.html"))
    elif arguments.out:
        raise UserError("report: --out is for several runs; a run's report lies in its workdir")
    else:
        print(write_report(workdirs[0]))


COMMAND = Command(
    summary="Write the HTML report of a run again, from its own logs, or compare runs.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "report --workdir=runs/digits",
        "report runs/a runs/b runs/c --out=abc.html",
    ),
)
