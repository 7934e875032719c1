"""The commands: `python -m vit_jax COMMAND ...`, also installed as `vit-jax`.

Nothing heavy is imported until a command runs, so that `--help` answers at once.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from vit_jax import errors
from vit_jax.errors import UserError, nearest

_CONFIG_HELP = "config file, with arguments after a colon: configs/digits.py:runlocal"
_OVERRIDES = """\
Any key of the config can be set with --config.KEY=VALUE, such as --config.optim.lr=0.003.
`python -m vit_jax train --keys` lists them all."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the process's exit code (see `vit_jax.errors`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return _run(argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return errors.EXIT_USER_ERROR
    except errors.Interrupted as notice:
        print(notice, file=sys.stderr)
        return errors.EXIT_INTERRUPTED
    except errors.Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + 2
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _run(argv: list[str]) -> int | None:
    argv, overrides = split_overrides(argv)
    parser, commands = _parsers()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise UserError(f"unknown command {argv[0]!r}; {nearest(argv[0], commands)}")
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    if unknown:
        flags = commands[arguments.command]._option_string_actions
        flag = unknown[0].split("=")[0]
        raise UserError(f"{arguments.command}: unknown argument {flag!r}; {nearest(flag, flags)}")
    if overrides and not getattr(arguments, "config", None):
        raise UserError(f"--config.{next(iter(overrides))} is set, but --config=FILE is missing")
    arguments.overrides = overrides
    return arguments.run(arguments)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.KEY=VALUE` (or `--config.KEY VALUE`) from the other arguments."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    items = iter(argv)
    for item in items:
        if not item.startswith("--config."):
            rest.append(item)
            continue
        key, equals, value = item.removeprefix("--config.").partition("=")
        if not equals:
            value = next(items, None)
            if value is None or value.startswith("--"):
                raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
        overrides[key] = value
    return rest, overrides


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="python -m vit_jax",
        description="Vision Transformers in JAX: train, evaluate, fine-tune, look inside.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands: dict[str, Parser] = {}

    def command(name: str, run: Callable, summary: str, epilog: str = "") -> Parser:
        commands[name] = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        commands[name].set_defaults(run=run)
        return commands[name]

    train = command("train", _train, "train, or resume what is in the workdir", _OVERRIDES)
    train.add_argument("--config", metavar="FILE[:ARGS]", help=_CONFIG_HELP)
    train.add_argument("--workdir", metavar="DIR", help="where the run is kept; may be gs://...")
    train.add_argument("--keys", action="store_true", help="list every config key and stop")
    _add_cluster(train)

    evaluate = command(
        "evaluate", _evaluate, "exact metrics of a run's newest checkpoint", _OVERRIDES
    )
    evaluate.add_argument("--workdir", metavar="DIR", required=True, help="a run that was trained")
    evaluate.add_argument("--step", type=int, help="checkpoint to evaluate; default: the newest")
    evaluate.add_argument("--json", metavar="FILE", help="also write the metrics there")
    _add_cluster(evaluate)

    report = command("report", _report, "rebuild the report of a run")
    report.add_argument("--workdir", metavar="DIR", required=True, help="a run, finished or not")

    data = command(
        "data", _data, "draw what the model sees: a sheet of training images", _OVERRIDES
    )
    data.add_argument("--config", metavar="FILE[:ARGS]", required=True, help=_CONFIG_HELP)
    data.add_argument("--out", metavar="FILE", default="data.png", help="default: %(default)s")
    data.add_argument("--images", type=int, default=64, help="how many; default: %(default)s")
    data.add_argument("--step", type=int, default=0, help="from the batch of this step on")

    prepare = command("prepare", _prepare, "prepare a dataset for training")
    prepare.add_argument("name", help="digits, or any TFDS name")
    prepare.add_argument("--data_dir", metavar="DIR", default="", help="default: TFDS's own")
    return parser, commands


def _add_cluster(parser: Parser) -> None:
    group = parser.add_argument_group("several processes (found by itself on Cloud TPU and SLURM)")
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num-processes", type=int, default=0)
    group.add_argument("--process-id", type=int, default=-1)


def _cluster(arguments: argparse.Namespace):
    from vit_jax.runtime import Cluster

    return Cluster(arguments.coordinator, arguments.num_processes, arguments.process_id)


def _train(arguments: argparse.Namespace) -> int:
    from vit_jax import config as config_lib

    if arguments.keys:
        print(config_lib.describe())
        return 0
    for flag in ("config", "workdir"):
        if not getattr(arguments, flag):
            raise UserError(f"train: --{flag} is missing (see python -m vit_jax train --help)")
    config = config_lib.load(arguments.config, arguments.overrides)
    from vit_jax import runtime
    from vit_jax.train import train

    runtime.setup(config.compilation_cache, config.precision, _cluster(arguments))
    results = train(config, arguments.workdir)
    for name, value in results.items():
        print(f"{name:32} {value:.6g}")
    print(f"report: {arguments.workdir}/report.html")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    raise NotImplementedError


def _report(arguments: argparse.Namespace) -> int:
    from vit_jax.report import write_report
    from vit_jax.workdir import Workdir

    print(write_report(Workdir.existing(arguments.workdir).path))
    return 0


def _data(arguments: argparse.Namespace) -> int:
    raise NotImplementedError


def _prepare(arguments: argparse.Namespace) -> int:
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main())
