"""Damaged checkpoints: seeds of every format, and mutations that a number decides."""

import contextlib
import functools
import io
import json
import shutil
import signal
import struct
import warnings
import zipfile

import numpy as np
from golden_cases import GOLDEN
from models_to_save import build

from vit_jax import checkpoints
from vit_jax.checkpoints import loading
from vit_jax.checkpoints.fit.inference import infer_model
from vit_jax.errors import UserError

# Values that a header or a config should not hold, each for a number, a text or a list.
ODD = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, float("inf"), float("nan"), "", "F32",
       [], [0, 0], [2**40, 2**40], [-1, 1], {}, {"a": {}}, [[[[]]]], "\x00", "é" * 300]  # fmt: skip

# Formats whose files hold a checksum of each array.
CHECKED = ("npz", "pth", "orbax")

SECONDS = 20
"""Longest time that one damaged checkpoint may take."""


def write_seeds(folder):
    """Writes a small checkpoint of every format; returns name → path."""
    model, params, _ = build("token")
    paths = {
        "npz": folder / "c.npz",
        "safetensors": folder / "c.safetensors",
        "hf": folder / "hf",
        "orbax": folder / "orbax",
    }
    for name, path in paths.items():
        to = {"safetensors": "timm"}.get(name, name)
        checkpoints.save(params, model, path, to)
    paths["pth"] = shutil.copy(GOLDEN / "interop" / "torch_views.pth", folder / "c.pth")
    paths["old_pth"] = shutil.copy(GOLDEN / "interop" / "torch_old.bin", folder / "c.bin")
    paths["timm_folder"] = folder / "timm"
    paths["timm_folder"].mkdir()
    shutil.copy(paths["safetensors"], folder / "timm" / "model.safetensors")
    (folder / "timm" / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    return paths


def mutate(path, target, number):
    """Copies a seed to `target`, and damages one of its files in a way that `number` decides."""
    rng = np.random.default_rng(number)
    if path.is_dir():
        shutil.copytree(path, target)
        files = sorted(x for x in target.rglob("*") if x.is_file() and x.stat().st_size)
        file = files[rng.integers(len(files))]
    else:
        file = target
        shutil.copy(path, file)
    data = file.read_bytes()
    ways = [flip, flip_start, cut, splice, number_in_place]
    if data[:2] == b"PK":
        ways += [rewritten_member] * 3
    elif data[8:9] == b"{":
        ways += [changed_header] * 3
    elif data[:1] == b"{":
        ways += [changed_json] * 3
    way = ways[rng.integers(len(ways))]
    file.write_bytes(way(data, rng))
    return way.__name__


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


def changed_json(data, rng):
    try:
        tree = json.loads(data)
    except ValueError:
        return flip(data, rng)
    return json.dumps(changed_tree(tree, rng)).encode()


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


def changed_header(data, rng):
    (length,) = struct.unpack("<Q", data[:8])
    header = changed_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


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
                way = [flip, flip_start, cut, splice, number_in_place][rng.integers(5)]
                content = way(content, rng)
            new.writestr(name, content)
    return stream.getvalue()


class TookTooLong(BaseException):
    """A checkpoint was read for longer than `SECONDS`."""


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(path):
    """Returns the arrays of a checkpoint, or None where a `UserError` of one line refuses it."""
    with time_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            weights = loading.read_weights(path)
            arrays = dict(weights.arrays)
            infer_model(weights, num_heads=2)
        except UserError as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error
            return None
    return arrays


@functools.cache
def expected_arrays(path):
    return loading.read_weights(path).arrays


def check(kind, path, target, number):
    """Raises an AssertionError if a damaged checkpoint loads as something else in silence."""
    way = mutate(path, target, number)
    try:
        arrays = outcome(target)
    finally:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    # A rewritten member has a right checksum of wrong bytes: nobody can notice.
    if arrays is not None and kind in CHECKED and way != "rewritten_member":
        expected = expected_arrays(path)
        for name in arrays.keys() & expected.keys():
            np.testing.assert_array_equal(arrays[name], expected[name], err_msg=f"{way} {name}")
