"""Command lines held against the public reference of gcloud and kubectl.

`reference/commands.json` holds the commands that the launcher and its page use, each with the page
that documents it, and of each the flags with the values that they take.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

from vit_jax.parallel import accelerators

REFERENCE = json.loads((Path(__file__).parent / "reference/commands.json").read_text())
for _commands in REFERENCE.values():
    for _name, _entry in _commands.items():
        if "extends" in _entry:  # It has all that this command has, and more flags.
            _base = _commands[_entry["extends"]]
            _commands[_name] = {**_base, **_entry, "flags": {**_base["flags"], **_entry["flags"]}}

_SHAPE = r"\d+x\d+(x\d+)?"
_VALUES = {
    "text": r"(?s).+",
    "int": r"-?\d+",
    "bool": r"true|false",
    "duration": r"(\d+[dhms])+|\d+",
    "pair": r"\w+=.+",
    "pairs": r"[\w.-]+=[^,]+(,[\w.-]+=[^,]+)*",
    "shape": _SHAPE,
    "workers": r"all|\d+(-\d+)?(,\d+(-\d+)?)*",
    "path": r"projects/[^/]+/(regions|zones)/[^/]+/[^/]+/[^/]+",
    "machine": r"ct\d\w+-(hightpu|standard)-\d+t|tpu7x-standard-\d+t",
}


class Refused(Exception):
    """The real command would refuse this command line."""


def check(words):
    """Returns (command, positionals, flags with their values) of a command line.

    Raises:
      Refused: the reference lacks the command, a flag or a value, or asks for another one.
    """
    program, *rest = words
    if program == "env":  # It sets variables for the command that follows.
        program, *rest = itertools.dropwhile(lambda word: "=" in word, rest)
    commands = REFERENCE["python" if program == sys.executable else program]
    names = [name for name in commands if rest[: len(name.split())] == name.split()]
    if not names:
        raise Refused(f"{program} has no command {' '.join(rest[:4])}")
    name = max(names, key=len)
    known, positionals, flags = commands[name], [], {}
    for word in rest[len(name.split()) :]:
        if not word.startswith("--"):
            positionals.append(word)
            if known.get("passes on"):  # The rest is for the program that it starts.
                break
            continue
        flag, equals, value = word[2:].partition("=")
        if flag not in known["flags"]:
            raise Refused(f"{name}: no flag --{flag} ({known['source']})")
        _check_value(name, flag, known["flags"][flag], bool(equals), value)
        flags.setdefault(flag, []).append(value)
    least, most = map(int, known["positionals"].split("-"))
    if not least <= len(positionals) <= most:
        raise Refused(f"{name}: {len(positionals)} positional arguments")
    missing = [flag for flag in known["required"] if flag not in flags]
    if missing:
        raise Refused(f"{name}: --{missing[0]} is missing")
    for group in known["exclusive"]:
        if len([flag for flag in group if flag in flags]) > 1:
            raise Refused(f"{name}: only one of {group}")
    _check_capacity(name, flags)
    return name, positionals, flags


def _check_value(name, flag, kind, has_value, value):
    if kind == "none":
        if has_value:
            raise Refused(f"{name}: --{flag} takes no value")
        return
    if kind.startswith("choice:"):
        fits = value in kind.removeprefix("choice:").split("|")
    elif kind == "accelerator":
        # Cloud TPU spells v5e as v5litepod, and has no other generation than these.
        found = accelerators.parse_slice(value)
        fits = found is not None and found.type == value and bool(found.tpu.runtime)
    else:
        fits = re.fullmatch(_VALUES[kind], value)
    if not (has_value and fits):
        raise Refused(f"{name}: --{flag}={value!r} is no {kind}")


def _check_capacity(name, flags):
    """Combinations that the pages of Spot, flex-start and managed instance groups ask for."""
    model = (flags.get("provisioning-model") or [""])[0]
    ends = flags.get("instance-termination-action") == ["DELETE"]
    if model in ("FLEX_START", "RESERVATION_BOUND") and not ends:
        raise Refused(f"{name}: {model} needs --instance-termination-action=DELETE")
    if model == "FLEX_START" and "max-run-duration" not in flags:
        raise Refused(f"{name}: FLEX_START needs --max-run-duration")
    if model == "FLEX_START" and flags.get("reservation-affinity") != ["none"]:
        raise Refused(f"{name}: FLEX_START needs --reservation-affinity=none")
    if "workload-policy" in flags and flags.get("target-size-policy-mode") != ["bulk"]:
        raise Refused(f"{name}: a TPU topology needs bulk mode")
    is_bulk = flags.get("target-size-policy-mode") == ["bulk"]
    if is_bulk and flags.get("default-action-on-vm-failure") != ["do-nothing"]:
        raise Refused(f"{name}: bulk mode of flex-start hosts needs repairs turned off")
    if "flex-start" in flags and flags.get("num-nodes") != ["0"]:
        raise Refused(f"{name}: flex-start begins with 0 nodes")
    if "flex-start" in flags and "enable-autoscaling" not in flags:
        raise Refused(f"{name}: flex-start needs --enable-autoscaling")
    if "reservation" in flags and flags.get("reservation-affinity", ["specific"]) != ["specific"]:
        raise Refused(f"{name}: a reservation needs --reservation-affinity=specific")
    for worker in flags.get("worker", []):
        for first, last in re.findall(r"(\d+)-(\d+)", worker):
            if int(first) >= int(last) or int(last) - int(first) >= 100:
                raise Refused(f"{name}: --worker={worker} is no range of at most 100 workers")


RECORDER = """#!/bin/bash
exec 9>>"$RECORD"
flock 9  # These run at the same time, and bash writes line by line.
printf '%s\\0' "${0##*/}" "$@" $'\\n' >&9
exec 9>&-
case "$*" in
  *list-instances*) printf '%s\\n' pod-zbcd pod-ybcd ;;
  *worker-network-endpoints*) echo 10.0.0.2 ;;
  "config get project") echo p ;;
  "apply "*) cat >"$RECORD.manifest" ;;
esac
"""


def pasted(text, folder):
    """The command lines, as lists of words, that a shell runs where `text` is pasted into it.

    All are held against the reference.
    """
    text = text.replace(sys.executable, "python")
    for name in REFERENCE:
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    record = folder / "record"
    record.write_text("")
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "RECORD": str(record)}
    done = subprocess.run(
        ["bash", "-c", text], env=variables, cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = [line.split("\0") for line in record.read_text().split("\0\n\0") if line]
    for words in lines:
        check(words)
    return lines
