"""`tpu create|train|check|logs|status|stop|delete NAME`: runs on TPU slices of Google Cloud.

The flags of the launcher. It needs nothing but Python and `gcloud` (and `kubectl` for GKE), so that
a laptop can start it.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_jax.cli.parser import Command
from vit_jax.errors import UserError, nearest, program
from vit_jax.launch import slices as slices_lib
from vit_jax.launch.archive import REPOSITORY, no_checkout
from vit_jax.launch.backends import BACKENDS, usual
from vit_jax.launch.gcloud import check_passed
from vit_jax.launch.launcher import RESTARTS, Launcher
from vit_jax.launch.shell import Shell
from vit_jax.launch.slices import Slices
from vit_jax.version import PROJECT_FILE

_TEXTS = {
    "network": "VPC network of the hosts, as gcloud takes it (default: the project's).",
    "subnetwork": "Subnetwork of the hosts, as gcloud takes it.",
    "service-account": "Service account that the hosts act as, as gcloud takes it; on GKE that of"
    " Kubernetes.",
    "reservation": "Reservation that the slices come from.",
    "provisioning-model": "Kind of capacity: standard, spot, flex-start or reservation-bound.",
    "max-run-duration": "Time after which the slices end, such as 7d.",
    "labels": "Labels for the bill, as KEY=VALUE,KEY=VALUE.",
    "tags": "Network tags, as TAG,TAG.",
    "version": "TPU runtime, or image family on Compute Engine (default: the usual one of the"
    " type).",
    "image": "GKE: container image of the run, which the Dockerfile makes.",
    "cluster": "GKE: cluster that gets the node pools.",
    "location": "GKE: region or zone of the cluster (default: --zone).",
    "namespace": "GKE: namespace of Kubernetes.",
}
_SWITCHES = {
    "spot": "Ask for cheaper slices that may be preempted.",
    "internal-ip": "Create hosts without external addresses. Installing then needs Cloud NAT.",
    "iap": "Reach the hosts through Identity-Aware Proxy.",
    "autocheckpoint": "Cloud TPU: let the run save before the maintenance of a host.",
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(show_help=parser.print_help)
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION")
    _action(actions, "create", "Create slices, and wait until they are ready.")
    train = _action(actions, "train", "Start a run on all hosts, again until it is done.")
    _add_run(train)
    render = _action(actions, "render", "Print the manifest of a run on GKE.")
    _add_run(render)
    check = _action(actions, "check", "Measure every host and chip, and name what is wrong.")
    check.add_argument(
        "--workdir",
        default="",
        metavar="DIR",
        help="Also measure how fast each host writes and reads here, such as gs://BUCKET/check.",
    )
    logs = _action(actions, "logs", "Show the log of one host until its run ends.")
    logs.add_argument(
        "--worker",
        type=int,
        default=0,
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


def _action(
    actions: argparse._SubParsersAction, name: str, summary: str
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=summary, description=summary)
    parser.add_argument(
        "name",
        metavar="NAME",
        type=slices_lib.check_name,
        help="Name of the slice, or of all slices of a run: lower-case letters, digits, hyphens.",
    )
    parser.add_argument("--zone", help="Google Cloud zone (default: that of `tpu create`).")
    parser.add_argument("--project", help="Google Cloud project (default: that of gcloud).")
    parser.add_argument(
        "--backend",
        help="Where the slices come from: cloud-tpu, compute-engine or gke (default: cloud-tpu,"
        " and compute-engine for types that it does not serve).",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Print the commands, and run nothing."
    )
    parser.add_argument(
        "--poll",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="Seconds between two looks at the slices (default: %(default)s).",
    )
    _add_slices(parser)
    return parser


def _add_slices(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that describe slices. None stands for a flag that was not given."""
    group = parser.add_argument_group("the slices (default: as they were created)")
    group.add_argument(
        "--type", help="Accelerator type or shape, such as v5litepod-256, tpu7x-128 or v4:4x4x8."
    )
    group.add_argument(
        "--slices", type=int, metavar="N", help="Number of slices of that type (default: 1)."
    )
    group.add_argument(
        "--queued",
        action=argparse.BooleanOptionalAction,
        help="Cloud TPU: wait in a queue for capacity (default: for more than one host).",
    )
    group.add_argument(
        "--data-disk",
        action="append",
        metavar="source=DISK,mode=MODE",
        help="Disk to attach to every host, as gcloud's tpu-vm create takes it. May be repeated.",
    )
    for flag, text in _SWITCHES.items():
        group.add_argument(f"--{flag}", action="store_const", const=True, help=text)
    for flag, text in _TEXTS.items():
        group.add_argument(f"--{flag}", metavar="NAME", help=text)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        default="",
        metavar="NAME[:ARGS]",
        help="The config of the run, as `train` takes it: a file below the root of the checkout, or"
        " the name of a recipe. Required.",
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
    if arguments.overrides and arguments.action not in ("train", "render"):
        key = next(iter(arguments.overrides))
        raise UserError(f"tpu {arguments.action} takes no --config.{key}")
    if arguments.passed and arguments.action != "create":
        raise UserError(f"tpu {arguments.action} passes nothing on: {arguments.passed[0]}")
    if not 0 <= arguments.poll < float("inf"):
        raise UserError(f"--poll={arguments.poll}: write seconds from 0 up")
    slices = _slices(arguments)
    make = BACKENDS.find(slices.backend, "--backend")
    shell = Shell(dry_run=arguments.dry_run)
    launcher: Launcher = make(slices, shell, arguments.poll)
    actions: dict[str, Callable[[], int | None]] = {
        "create": launcher.create,
        "train": lambda: _train(launcher, arguments),
        "render": lambda: print(launcher.render(_words(launcher, arguments)), end=""),
        "check": lambda: _check(launcher, arguments.workdir),
        "logs": lambda: _logs(launcher, arguments),
        "status": launcher.status,
        "stop": launcher.stop,
        "delete": launcher.delete,
    }
    if arguments.action == "logs":  # Which may have nothing to say.
        return actions["logs"]()
    with shell.never_silent(slices.name):
        return actions[arguments.action]()


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `Slices` that were written on the command line."""
    fields = [field.name for field in dataclasses.fields(Slices)]
    values = {field: getattr(arguments, field, None) for field in fields}
    given: dict[str, Any] = {field: value for field, value in values.items() if value is not None}
    if arguments.passed:
        given["flags"] = tuple(arguments.passed)
    if "backend" in given:
        given["backend"] = given["backend"].replace("-", "_")
    return given


def _slices(arguments: argparse.Namespace) -> Slices:
    """Returns the slices that the flags describe, or those that this machine created before."""
    name, action, given = arguments.name, arguments.action, _given(arguments)
    if action == "create":
        for flag in ("type", "zone"):
            if not given.get(flag):
                raise UserError(
                    f"tpu create: --{flag} is missing (see {program()} tpu create --help)"
                )
        check_passed(arguments.passed)
        slices = Slices(**given)
        backend = given.get("backend") or usual(slices)
        # What waits in a queue is remembered, so that later commands ask the queue.
        queued = given.get("queued", backend == "cloud_tpu" and slices.hosts > 1)
        return dataclasses.replace(slices, backend=backend, queued=queued)
    known = slices_lib.recall(name)
    if known is None:
        if not given.get("zone") and given.get("backend") != "gke":
            raise UserError(f"tpu {action}: {name} was not created from this machine; add --zone")
        slices = Slices(**given)
        return slices if "backend" in given else dataclasses.replace(slices, backend=usual(slices))
    slices = dataclasses.replace(known, **given)
    if action == "delete" and (field := slices_lib.differing(known, slices)):
        # Or these would be forgotten, and go on to cost, for others that are not there.
        raise slices_lib.taken(known, field)
    return slices


def _words(launcher: Launcher, arguments: argparse.Namespace) -> list[str]:
    """Returns the arguments of the command `train` on the hosts."""
    action = arguments.action
    for flag in ("config", "workdir"):
        if not getattr(arguments, flag):
            raise UserError(
                f"tpu {action}: --{flag} is missing (see {program()} tpu {action} --help)"
            )
    workdir, config = _reached_by_all(arguments.workdir), arguments.config
    if bool(arguments.commit) != bool(arguments.repository):
        raise UserError(f"tpu {action}: --commit and --repository go together")
    if launcher.copies_code and not arguments.commit:
        _check_is_copied(config.partition(":")[0])
    return [
        f"--restarts={RESTARTS}",
        f"--config={config}",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in arguments.overrides.items()),
    ]


def _check_is_copied(path: str) -> None:
    """Raises a `UserError` unless this checkout has the config file, or recipe, of that name."""
    if not (REPOSITORY / PROJECT_FILE).is_file():
        raise no_checkout(REPOSITORY)
    recipes = REPOSITORY / "configs"
    is_inside = not os.path.isabs(path) and ".." not in Path(path).parts
    is_there = (REPOSITORY / path).is_file() or (recipes / f"{path}.py").is_file()
    if not is_inside or not is_there:
        valid = nearest(path, [file.stem for file in recipes.glob("*.py")])
        raise UserError(
            f"--config={path}: no such file or recipe in {REPOSITORY}, which the hosts get; {valid}"
        )


def _reached_by_all(workdir: str) -> str:
    """Returns a folder that all hosts can reach. Raises a `UserError` for others."""
    scheme, mark, rest = workdir.partition("://")
    if not (scheme and rest.strip("/") if mark else workdir.startswith("/")):
        raise UserError(
            f"--workdir={workdir}: write gs://BUCKET/..., or the absolute path of a disk that all"
            " hosts share"
        )
    return workdir


def _check(launcher: Launcher, workdir: str) -> int:
    return launcher.check(_reached_by_all(workdir) if workdir else "")


def _train(launcher: Launcher, arguments: argparse.Namespace) -> int:
    pin = (arguments.repository, arguments.commit) if arguments.commit else None
    return launcher.train(_words(launcher, arguments), arguments.workdir, pin)


def _logs(launcher: Launcher, arguments: argparse.Namespace) -> None:
    slices = launcher.slices
    if not 0 <= arguments.slice < slices.slices:
        raise UserError(f"--slice={arguments.slice}: there are {slices.slices}, from 0")
    hosts = slices.hosts  # 0 where the number is not known.
    if arguments.worker < 0 or (hosts and arguments.worker >= hosts):
        most = f"from 0 to {hosts - 1}" if hosts > 1 else "0" if hosts else "from 0 on"
        raise UserError(f"--worker={arguments.worker}: write a number {most}")
    launcher.logs(arguments.slice, str(arguments.worker))


COMMAND = Command(
    summary="Create TPU slices on Google Cloud, and keep runs going on them until they are done.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "tpu create pod --type=v5litepod-256 --zone=us-west4-a --spot",
        "tpu check pod",
        "tpu train pod --config=configs/vit_s16_i1k.py --workdir=gs://BUCKET/run",
        "tpu logs pod",
        "tpu delete pod",
    ),
    notes="`tpu train` starts the run again after preemptions and lost hosts. With --dry-run\n"
    "every action prints its commands and runs nothing. `tpu create ... -- FLAG` hands further\n"
    "flags to the command that creates the slices. docs/launching.md tells more.",
    overrides=("config",),
    passes_on=True,
)
