"""`tpu create|train|logs|status|stop|delete NAME`: runs on Cloud TPU slices.

The flags of the launcher. It needs nothing but Python and `gcloud`, so that a laptop can start it.
"""

import argparse
import dataclasses
from collections.abc import Callable

from vit_jax.cli.parser import Command
from vit_jax.errors import UserError, program
from vit_jax.launch import gcloud, tpu
from vit_jax.launch.gcloud import Gcloud, Slices

_SLICE_FLAGS = {
    "network": "VPC network of the hosts, as gcloud takes it (default: the project's).",
    "subnetwork": "Subnetwork of the hosts, as gcloud takes it.",
    "service-account": "Service account that the hosts act as, as gcloud takes it.",
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(show_help=parser.print_help)
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION")
    _add_create(_action(actions, "create", "Create a slice, and wait until it is ready."))
    _add_train(_action(actions, "train", "Start a run on all hosts, again until it is done."))
    logs = _action(actions, "logs", "Show the log of one host until its run ends.")
    logs.add_argument(
        "--worker",
        default="0",
        metavar="N",
        help="Number of the host in its slice (default: %(default)s).",
    )
    logs.add_argument(
        "--slice",
        type=int,
        default=0,
        metavar="N",
        help="Number of the slice, if there are several (default: %(default)s).",
    )
    _action(actions, "status", "Print the state of the slices and of every host.")
    _action(actions, "stop", "Let the run save and end. The slices stay, and cost.")
    _action(actions, "delete", "Delete the slices. The workdir of the run stays.")


def _action(actions, name: str, summary: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=summary, description=summary)
    parser.add_argument(
        "name",
        metavar="NAME",
        type=gcloud.check_name,
        help="Name of the slice, or of all slices of a run: lower-case letters, digits, hyphens.",
    )
    parser.add_argument(
        "--zone", default="", help="Google Cloud zone (default: that of `tpu create`)."
    )
    parser.add_argument(
        "--project", default="", help="Google Cloud project (default: that of gcloud)."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Print the gcloud commands, and run nothing."
    )
    parser.add_argument(
        "--poll",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="Seconds between two looks at the slices (default: %(default)s).",
    )
    return parser


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--type", default="", help="Accelerator type, such as v5litepod-256. Required."
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="Number of slices of that type (default: %(default)s).",
    )
    parser.add_argument(
        "--spot", action="store_true", help="Ask for cheaper slices that may be preempted."
    )
    parser.add_argument(
        "--queued",
        action="store_true",
        help="Wait in a queue for capacity. Several slices always do.",
    )
    parser.add_argument(
        "--version", default="", help="TPU runtime version (default: the usual one of the type)."
    )
    parser.add_argument(
        "--internal-ip",
        action="store_true",
        help="Create hosts without external addresses. Installing then needs Cloud NAT.",
    )
    for flag, text in _SLICE_FLAGS.items():
        parser.add_argument(f"--{flag}", default="", metavar="NAME", help=text)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        default="",
        metavar="FILE[:ARGS]",
        help="The config file of the run, as `train` takes it. Required.",
    )
    parser.add_argument(
        "--workdir",
        default="",
        metavar="DIR",
        help="The folder that keeps the run: gs://BUCKET/..., or the absolute path of a disk that"
        " all hosts share. Required.",
    )
    parser.add_argument(
        "--commit",
        default="",
        metavar="SHA",
        help="Run this commit instead of a copy of the working tree. Needs --repository.",
    )
    parser.add_argument(
        "--repository",
        default="",
        metavar="URL",
        help="With --commit: the git repository that the hosts clone.",
    )


def _run(arguments: argparse.Namespace) -> int | None:
    if arguments.action is None:
        arguments.show_help()
        return None
    if arguments.overrides and arguments.action != "train":
        key = next(iter(arguments.overrides))
        raise UserError(f"tpu {arguments.action} takes no --config.{key}")
    launcher = tpu.Launcher(_slices(arguments), Gcloud(dry_run=arguments.dry_run), arguments.poll)
    actions: dict[str, Callable[[], int | None]] = {
        "create": launcher.create,
        "train": lambda: _train(launcher, arguments),
        "logs": lambda: _logs(launcher, arguments),
        "status": launcher.status,
        "stop": launcher.stop,
        "delete": launcher.delete,
    }
    return actions[arguments.action]()


def _slices(arguments: argparse.Namespace) -> Slices:
    """Returns the slices that the flags describe, or those that this machine created before."""
    name, action = arguments.name, arguments.action
    if action == "create":
        for flag in ("type", "zone"):
            if not getattr(arguments, flag):
                raise UserError(
                    f"tpu create: --{flag} is missing (see {program()} tpu create --help)"
                )
        fields = [field.name for field in dataclasses.fields(Slices)]
        return Slices(**{field: getattr(arguments, field) for field in fields})
    known = gcloud.recall(name)
    if known is None:
        if not arguments.zone:
            raise UserError(f"tpu {action}: {name} was not created from this machine; add --zone")
        return Slices(name, arguments.zone, project=arguments.project)
    changes = {field: getattr(arguments, field) for field in ("zone", "project")}
    return dataclasses.replace(known, **{key: value for key, value in changes.items() if value})


def _train(launcher: tpu.Launcher, arguments: argparse.Namespace) -> int:
    for flag in ("config", "workdir"):
        if not getattr(arguments, flag):
            raise UserError(f"tpu train: --{flag} is missing (see {program()} tpu train --help)")
    workdir, config = arguments.workdir, arguments.config
    if "://" not in workdir and not workdir.startswith("/"):
        raise UserError(
            f"--workdir={workdir}: write gs://BUCKET/..., or the absolute path of a disk that all"
            " hosts share"
        )
    if bool(arguments.commit) != bool(arguments.repository):
        raise UserError("tpu train: --commit and --repository go together")
    path = config.partition(":")[0]
    if not arguments.commit and not (tpu.REPOSITORY / path).is_file():
        raise UserError(f"--config={path}: no such file in {tpu.REPOSITORY}, which the hosts get")
    words = [
        f"--restarts={tpu.RESTARTS}",
        f"--config={config}",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in arguments.overrides.items()),
    ]
    pin = (arguments.repository, arguments.commit) if arguments.commit else None
    return launcher.train(words, workdir, pin)


def _logs(launcher: tpu.Launcher, arguments: argparse.Namespace) -> None:
    slices = launcher.slices
    if not 0 <= arguments.slice < slices.slices:
        raise UserError(f"--slice={arguments.slice}: there are {slices.slices}, from 0")
    launcher.logs(slices.nodes[arguments.slice], arguments.worker)


COMMAND = Command(
    summary="Create Cloud TPU slices, and keep runs going on them until they are done.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "tpu create pod --type=v5litepod-256 --zone=us-west4-a --spot",
        "tpu train pod --config=configs/vit_s16_i1k.py --workdir=gs://BUCKET/run",
        "tpu logs pod",
        "tpu delete pod",
    ),
    notes="`tpu train` starts the run again after preemptions and lost hosts. With --dry-run\n"
    "every action prints its gcloud commands and runs nothing. docs/launching.md tells more.",
    overrides=("config",),
)
