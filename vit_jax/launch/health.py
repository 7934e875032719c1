"""The table of `tpu check`: a row for each host, and what is wrong with it."""

import collections
import contextlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit_jax.parallel.accelerators import CHIPS, Slice, of_kind

MARK = "CHECK "
"""The beginning of the lines that `vit_jax.launch.measure` prints for this table."""

CHECK_SECONDS = 1800.0
"""A check ends after this time even if some hosts have not: they may hang, or may not come."""

SLOW = 0.8
"""A chip is slow below this share of the median of all chips."""


def table(
    told: str, silent: Sequence[str], known: Iterable[str], shape: Slice | None
) -> tuple[str, int]:
    """Returns the table, and the exit code: 0 if every host is well, else 1.

    Args:
      told: the output of all hosts.
      silent: hosts that do not answer; the others have then not been measured.
      known: the names of the hosts that have answered before.
      shape: the slice of which the hosts are; None if it is not known.
    """
    if silent:
        answers = [(name, "answers") for name in sorted(known) if name not in silent]
        answers += [(name, "NO ANSWER") for name in silent]
        return _aligned([("host", "verdict"), *answers]), 1
    hosts = _merged(told)
    for name in set(known) - set(hosts):
        hosts[name] = {}
    if not hosts:
        return "no host was measured", 1
    usual = _usual_versions(hosts)
    speeds = [chip["tflops"] for found in hosts.values() for chip in found.get("chips", [])]
    median = statistics.median(speeds) if speeds else 0.0
    chips = shape.chips // shape.hosts * CHIPS[shape.generation].devices if shape else 0
    rows = []
    code = 0
    for name, found in sorted(hosts.items()):
        wrong = _wrong(found, usual, median, chips)
        code = max(code, bool(wrong))
        rows.append((name, *_figures(found), "; ".join(wrong) or "ok"))
    head = ("host", "devices", "TFLOP/s", "all-reduce GB/s", "write MB/s", "read MB/s", "verdict")
    versions = ", ".join(f"{name} {value}" for name, value in usual.items())
    return f"{_aligned([head, *rows])}\n{versions}", int(code)


def _merged(told: str) -> dict[str, dict[str, Any]]:
    """Returns what each host has told, in one mapping."""
    hosts: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for line in told.splitlines():
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):  # The last line of a host that was cut off.
                found = json.loads(line.removeprefix(MARK))
                hosts[found.pop("host")].update(found)
    return dict(hosts)


def _usual_versions(hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the versions that most hosts have."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for found in hosts.values():
        for name, value in found.get("versions", {}).items():
            counts[name][value] += 1
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def _wrong(
    found: Mapping[str, Any], usual: Mapping[str, str], median: float, devices: int
) -> list[str]:
    """Returns what is wrong with a host."""
    wrong = []
    if not found:
        return ["NO ANSWER"]
    if "error" in found:
        wrong.append(found["error"])
    for name, value in found.get("versions", {}).items():
        if value != usual[name]:
            wrong.append(f"{name} {value}, others {usual[name]}")
    chips = found.get("chips")
    if chips is None:
        return [*wrong, "its chips did not start"] if "error" not in found else wrong
    if devices and len(chips) != devices:
        wrong.append(f"{len(chips)} of {devices} devices")
    for number, chip in enumerate(chips):
        if not chip["right"]:
            wrong.append(f"device {number}: WRONG PRODUCT")
        # Virtual devices share the cores of their machine, so that their speeds say nothing.
        elif of_kind(chip["kind"]) and chip["tflops"] < SLOW * median:
            wrong.append(f"device {number}: {chip['tflops']:.1f} TFLOP/s, others {median:.1f}")
    reduced = found.get("all_reduce")
    if reduced is None and "error" not in found:
        wrong.append("the all-reduce did not end")
    elif reduced and not reduced["right"]:
        wrong.append("WRONG all-reduce")
    return wrong


def _figures(found: Mapping[str, Any]) -> list[str]:
    chips, storage = found.get("chips", []), found.get("storage", {})
    slowest = min((chip["tflops"] for chip in chips), default=None)
    numbers = (
        slowest,
        found.get("all_reduce", {}).get("gb_per_s"),
        storage.get("write"),
        storage.get("read"),
    )
    return [str(len(chips)), *("-" if one is None else f"{one:.1f}" for one in numbers)]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
