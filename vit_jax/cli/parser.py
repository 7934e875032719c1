"""Reads a command line: finds the command, separates overrides from flags, and runs the command.

Every public module of `vit_jax.cli.commands` is a command. Only the module of the command that was
asked for is imported, and it imports JAX and TensorFlow only when it runs.
"""

import argparse
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from vit_jax import plugins
from vit_jax.cli import commands
from vit_jax.errors import UserError, nearest, program
from vit_jax.plugins import names_in

_DESCRIPTION = "Vision Transformers in JAX: train, evaluate, fine-tune, and look inside."
_USUAL_ORDER = (
    "prepare digits",
    "data --config=configs/digits.py --out=sheet.png",
    "train --config=configs/digits.py --workdir=runs/digits",
    "evaluate --workdir=runs/digits",
    "predict --workdir=runs/digits digit.png",
)
_OVERRIDES_HELP = {
    "config": (
        "Any key of the config can be set with --config.KEY=VALUE, such as\n"
        "--config.optim.lr=0.003. `{program} train --keys` lists all keys."
    ),
    "model": (
        "Any field of a named model can be set with --model.FIELD=VALUE, such as\n--model.depth=6."
    ),
}


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of the program; its name is that of its module.

    Attributes:
      summary: one sentence for the list of commands and for the top of the command's help.
      run: does the work with the parsed arguments, and returns the exit code (None stands for 0).
        Besides the flags, the arguments hold `command` (the name), `given` (the words of the whole
        command line), `overrides` (of config keys) and `fields` (of the model).
      add_arguments: adds the command's flags to its parser.
      examples: command lines that work, without the name of the program.
      notes: more to know, in lines of at most 80 characters.
      overrides: the kinds of overrides that the command takes: "config" for --config.KEY=VALUE,
        "model" for --model.FIELD=VALUE.
      passes_on: whether words after `--` are not the command's own; its arguments then hold them as
        `passed`.
    """

    summary: str
    run: Callable[[argparse.Namespace], int | None]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    examples: Sequence[str]
    notes: str = ""
    overrides: Sequence[str] = ()
    passes_on: bool = False


class _StoreOnce(argparse._StoreAction):
    """Stores a flag's value, and refuses another one for it, where argparse takes the last."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        told = namespace.__dict__.setdefault("_told", {})
        first = told.setdefault(self.dest, values)
        if option_string and str(first) != str(values):
            raise argparse.ArgumentError(self, f"two values, {first!r} and {values!r}")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose help is whole sentences."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(add_help=False, **options)
        self.register("action", None, _StoreOnce)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: str) -> None:
        """Suggests the nearest choice, where argparse lists them all."""
        if action.choices is not None and value not in action.choices:
            suggestion = nearest(value, action.choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {suggestion}")


def run(argv: Sequence[str]) -> int | None:
    """Runs the command that a command line names; returns its exit code.

    Raises:
      UserError: there is no such command, or it does not take what was written.
    """
    passed: list[str] = []
    if "--" in argv and argv[0] in names() and find(argv[0]).passes_on:
        argv, passed = argv[: argv.index("--")], list(argv[argv.index("--") + 1 :])
    words, overrides = split_overrides(argv, "--config.")
    words, fields = split_overrides(words, "--model.")
    if not words or words[0].startswith("-"):
        overview = _overview()
        overview.parse_args(words)
        overview.print_help()
        return None
    name, *words = words
    command = find(name)
    parser = parser_of(name)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"{name}: unknown argument {flag!r}; {nearest(flag, _flags(parser))}")
    for kind, keys in (("config", overrides), ("model", fields)):
        if keys and kind not in command.overrides:
            raise UserError(f"{name} takes no --{kind}.{next(iter(keys))}")
    plugins.trust(getattr(arguments, "trust", ()))
    arguments.command, arguments.given = name, list(argv)
    arguments.overrides, arguments.fields = overrides, fields
    arguments.passed = passed
    return command.run(arguments)


def names() -> list[str]:
    """Returns the names of all commands."""
    return names_in(commands.__name__)


def find(name: str) -> Command:
    """Returns the command of a name. Raises a `UserError` if there is none."""
    if name not in names():
        raise UserError(f"unknown command {name!r}; {nearest(name, names())}")
    return importlib.import_module(f"{commands.__name__}.{name}").COMMAND


def parser_of(name: str) -> Parser:
    """Returns the parser of one command."""
    command = find(name)
    notes = [_OVERRIDES_HELP[kind].format(program=program()) for kind in command.overrides]
    parser = Parser(
        prog=f"{program()} {name}",
        description="\n\n".join(filter(None, [command.summary, command.notes])),
        epilog="\n\n".join([*notes, _shown(command.examples)]),
    )
    command.add_arguments(parser)
    return parser


def _overview() -> Parser:
    """Returns a parser that knows the names of the commands, but nothing of their flags."""
    parser = Parser(
        prog=program(),
        description=_DESCRIPTION,
        epilog=f"`{program()} COMMAND --help` tells more about one command.\n\n"
        + _shown(_USUAL_ORDER),
    )
    listed = parser.add_subparsers(title="commands", metavar="COMMAND", prog=program())
    for name in names():
        listed.add_parser(name, help=find(name).summary)
    return parser


def _shown(examples: Sequence[str]) -> str:
    """Returns the paragraph of a help text that shows examples."""
    return "\n".join(["examples:", *(f"  {program()} {example}" for example in examples)])


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the flags of a parser and of the parsers of its actions."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _flags(inner)


def split_overrides(argv: Sequence[str], prefix: str) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.KEY=VALUE` (or `--config.KEY VALUE`) from the other arguments.

    Of two values of one key the last counts, so that a script can append what its user gives it.

    prefix: such as `--config.`.

    Raises:
      UserError: an override has no value.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    items = iter(argv)
    for item in items:
        if not item.startswith(prefix):
            rest.append(item)
            continue
        key, equals, value = item.removeprefix(prefix).partition("=")
        if not equals:
            following = next(items, None)
            if following is None or following.startswith("--"):
                raise UserError(f"{prefix}{key} has no value; write {prefix}{key}=VALUE")
            value = following
        overrides[key] = value
    return rest, overrides
