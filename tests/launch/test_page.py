"""The command lines of docs/launching.md: what they stand for is in the public references."""

import re
import shlex
from pathlib import Path

import pytest
from cloud_reference import REFERENCE, check, pasted

from vit_jax.__main__ import main
from vit_jax.cli.parser import parser_of

PAGE = Path(__file__).parents[2] / "docs/launching.md"


def lines():
    """Every command line in a block of the page, with continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


LAUNCHES = [line for line in lines() if line.startswith("./run.sh tpu ")]
OWN = [line for line in lines() if line.startswith("python -m vit_jax ")]
OTHERS = [line for line in lines() if line.split()[0] in REFERENCE and line not in OWN]


def test_every_command_line_of_the_page_is_checked():
    assert {*lines()} - {*LAUNCHES, *OWN, *OTHERS} == {"VIT_JAX_EXTRAS=cuda ./run.sh install"}
    assert len(LAUNCHES) >= 15
    for line in OWN:
        command, *words = shlex.split(line)[3:]
        parser_of(command).parse_args([word.replace("$RANK", "3") for word in words])


@pytest.mark.parametrize("line", OTHERS)
def test_commands_of_others_are_in_their_reference(line):
    check(shlex.split(line))


def test_every_launch_prints_commands_that_can_be_pasted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for line in LAUNCHES:
        words = shlex.split(line.partition(" > ")[0])[2:]
        if not any(word.startswith(("--backend=", "--zone=")) for word in words):
            words.append("--zone=us-west4-a")  # Which `create` would have remembered.
        assert main(["tpu", *words[:2], "--dry-run", *words[2:]]) == 0, line
        printed = capsys.readouterr().out
        if words[0] != "render":
            assert pasted(printed, tmp_path), line
