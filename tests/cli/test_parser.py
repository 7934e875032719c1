"""The command line before any work begins: commands, help, overrides, and mistakes in them."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax import errors
from vit_jax.__main__ import main
from vit_jax.cli import parser
from vit_jax.cli.parser import split_overrides
from vit_jax.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES = parser.names()


def parsers(name):
    """The parser of a command, and those of its actions."""

    def below(found, title):
        yield pytest.param(found, id=title)
        for action in found._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner, child in action.choices.items():
                    yield from below(child, f"{title} {inner}")

    return list(below(parser.parser_of(name), name))


def test_every_file_of_a_command_is_a_command():
    files = {path.stem for path in (ROOT / "vit_jax/cli/commands").glob("[!_]*.py")}
    assert set(NAMES) == files
    assert {"train", "evaluate", "predict", "convert", "tpu"} <= files


@pytest.mark.parametrize("found", [found for name in NAMES for found in parsers(name)])
def test_help_is_whole_sentences(found):
    assert re.fullmatch(r"[A-Z].*\.", found.description, re.DOTALL)
    for action in found._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = [choice.help for choice in action._choices_actions]
        else:
            texts = [action.help]
        for text in texts:
            assert text, f"{action.dest} has no help"
            shown = text % {"default": action.default}
            assert re.fullmatch(r"[A-Z].*\.", shown, re.DOTALL), shown
    assert found.format_help().startswith(f"usage: {found.prog}")


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_examples_that_are_understood(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = parser.find(name)
    assert command.examples
    for example in command.examples:
        words, overrides = split_overrides(shlex.split(example), "--config.")
        words, fields = split_overrides(words, "--model.")
        assert words[0] == name
        parser.parser_of(name).parse_args(words[1:])
        assert not overrides or "config" in command.overrides
        assert not fields or "model" in command.overrides
        for config in re.findall(r"--config=(configs/\w+\.py)", example):
            assert (ROOT / config).is_file()


@pytest.mark.parametrize("name", ["", *NAMES])
def test_help_of_every_command_names_the_program(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m vit_jax {name}".rstrip())
    assert f"\n  python -m vit_jax {name}" in printed.partition("\nexamples:")[2]


def test_the_program_is_called_as_the_user_called_it(capsys, monkeypatch):
    for called, shown in (
        ("/usr/bin/vit-jax", "vit-jax"),
        ("/x/vit_jax/__main__.py", "python -m vit_jax"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        assert errors.program() == shown
        assert main(["train"]) == 2
        assert f"(see {shown} train --help)" in capsys.readouterr().err
    monkeypatch.setenv("VIT_JAX_PROGRAM", "./run.sh")
    assert errors.program() == "./run.sh"


def test_messages_call_the_program_as_the_user_did():
    """Texts that are no docstrings hold no spelling of it, which may be wrong for this user."""
    found = []
    for path in (ROOT / "vit_jax").rglob("*.py"):
        if "python -m vit_jax " in (code := path.read_text()):
            nodes = list(ast.walk(ast.parse(code)))
            docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            texts = [n for n in nodes if isinstance(n, ast.Constant) and id(n) not in docs]
            found += [(path.name, n.value) for n in texts if "python -m vit_jax " in str(n.value)]
    assert found == []


def test_without_a_command_all_are_listed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        assert f"\n    {name} " in printed


@pytest.mark.parametrize("words", ["--workdir=a --workdir=b", "--step=1 --workdir a --step 2"])
def test_a_flag_with_two_values_is_refused(words, capsys):
    assert main(["evaluate", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"argument --\w+: two values, '\w' and '\w'", line)


def test_a_launcher_has_the_last_word_on_restarts():
    words = ["--restarts=3", "--workdir=a", "--workdir=a", "--restarts=0"]
    assert parser.parser_of("train").parse_args(words).restarts == 0


def test_overrides_in_both_spellings():
    argv = ["--config=f", "--config.a.b=1", "--config.c", "2", "x"]
    rest, overrides = split_overrides(argv, "--config.")
    assert rest == ["--config=f", "x"]
    assert overrides == {"a.b": "1", "c": "2"}
    with pytest.raises(UserError, match="has no value"):
        split_overrides(["--config.a", "--workdir=w"], "--config.")


@pytest.mark.parametrize("name", ["", *NAMES])
def test_help_loads_nothing_heavy(name):
    code = (
        "import sys; from vit_jax.__main__ import main\n"
        f"try: main([*{name.split()}, '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('jax', 'flax', 'numpy', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip().endswith("[]")
