"""Damage that a number decides, for the fuzz corpora: of bytes, texts, JSON, and zip files."""

import contextlib
import io
import json
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile

# Values that a header or a config should not hold, each for a number, a text or a list.
ODD = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, float("inf"), float("nan"), "", "F32",
       [], [0, 0], [2**40, 2**40], [-1, 1], {}, {"a": {}}, [[[[]]]], "\x00", "é" * 300]  # fmt: skip

# The same for texts: separators, quote marks, brackets, paths, numbers that are too large.
ODD_TEXTS = ['"', "'", ",", "\t", "\n", "\r", "|", "(", ")", "[", "]", "{", "}", ":", "=", "%",
             "..", "../x", "/etc/passwd", "\0", "\ufeff", "\u2028", "\x1b[2J", "é", "-1", "0",
             "1e400", "nan", "9" * 5000, "[" * 3000, "None", "x", " "]  # fmt: skip

SECONDS = 20
"""Longest time that one damaged file may take."""

EXTRA_MEMORY = 1 << 30
"""Bytes that reading a small damaged file may take at most."""


def flip(data, rng):
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    return bytes(changed)


def flip_start(data, rng):
    return flip(data[:600], rng) + data[600:]


def cut(data, rng):
    return data[: rng.integers(len(data))]


def splice(data, rng):
    start, end, to = sorted(rng.integers(len(data), size=3))
    return data[:start] + data[end:to] + data[start:]


def number_in_place(data, rng):
    value = [0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF][rng.integers(6)]
    place = rng.integers(max(1, len(data) - 8))
    return data[:place] + struct.pack("<Q", value)[: rng.integers(1, 9)] + data[place + 8 :]


BYTES = [flip, flip_start, cut, splice, number_in_place]


def changed_text(data, rng):
    """Removes, repeats, or replaces up to three of the words and marks of a text."""
    parts = re.findall(r"\w+|\W", data.decode())
    for _ in range(rng.integers(1, 4)):
        place = rng.integers(len(parts))
        odd = ODD_TEXTS[rng.integers(len(ODD_TEXTS))]
        parts[place] = [odd, "", 2 * parts[place], parts[place] + odd][rng.integers(4)]
    return "".join(parts).encode()


def changed_json(data, rng):
    try:
        tree = json.loads(data)
    except ValueError:
        return flip(data, rng)
    return json.dumps(changed_tree(tree, rng)).encode()


def changed_line(data, rng):
    """Changes the JSON in one of the lines of a file."""
    lines = data.splitlines()
    place = rng.integers(len(lines))
    lines[place] = changed_json(lines[place], rng)
    return b"\n".join(lines)


def changed_tree(tree, rng):
    """Replaces, removes or adds one value somewhere in a tree of JSON."""
    if isinstance(tree, dict) and tree and rng.integers(8):
        key = list(tree)[rng.integers(len(tree))]
        if rng.integers(6) == 0:
            return {name: value for name, value in tree.items() if name != key}
        return {**tree, key: changed_tree(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.integers(3):
        place = rng.integers(len(tree))
        return [*tree[:place], changed_tree(tree[place], rng), *tree[place + 1 :]]
    return ODD[rng.integers(len(ODD))]


def rewritten_member(data, rng):
    """Damages a member of a zip file, whose checksum is then that of the damage."""
    stream = io.BytesIO()
    how = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][rng.integers(2)]
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", how) as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        chosen = names[rng.integers(len(names))]
        if pickles and rng.integers(2):
            chosen = pickles[0]
        for name in names:
            content = old.read(name)
            if name == chosen and content:
                content = BYTES[rng.integers(len(BYTES))](content, rng)
            new.writestr(name, content)
    return stream.getvalue()


class TookTooLong(BaseException):
    """A file was read for longer than `SECONDS`."""


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # The limit of the whole test (tests/conftest.py) goes on.
            passed = time.monotonic() - started
            signal.setitimer(signal.ITIMER_REAL, max(0.01, left - passed))


def run_within_limits(setup, loop):
    """Runs Python code in a process, whose address space is limited after `setup`."""
    code = (
        "import resource, sys; from pathlib import Path\n"
        f"sys.path = {sys.path}\n"
        f"{setup}\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        f"limit = pages * resource.getpagesize() + {EXTRA_MEMORY}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        f"{loop}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
