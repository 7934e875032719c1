"""Reads of files that others made: no pipes, no lost keys; JSON that every reader takes."""

import errno
import fcntl
import json
import logging
import math
import os

import pytest

from vit_jax import __main__, storage
from vit_jax.checkpoints import evaluation_params, files, manifest
from vit_jax.data import tokenizer
from vit_jax.errors import UserError, show
from vit_jax.report import sections
from vit_jax.report.html import write_report
from vit_jax.tracking import read_metrics
from vit_jax.training.lock import Holder
from vit_jax.training.workdir import Workdir

CLEAR = "\x1b[2J"  # What clears a terminal.


def test_only_regular_files_of_a_limited_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"1234")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        with pytest.raises(OSError, match="not a regular file"):
            storage.read_bytes(tmp_path / name)
    assert storage.read_bytes(tmp_path / "file", 4) == b"1234"
    with pytest.raises(OSError, match="4 bytes, more than the 3 that are read"):
        storage.read_bytes(tmp_path / "file", 3)


def test_a_pipe_in_a_workdir_is_refused_where_it_is_read(tmp_path):
    """Each of these waited for a writer for ever."""
    (tmp_path / "report").mkdir()
    step = tmp_path / "checkpoints" / "5"
    step.mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "report/sections.json", "checkpoints/5/d"):
        os.mkfifo(tmp_path / name)
    reads = {
        r"metrics\.jsonl: .*not a regular file": lambda: read_metrics(tmp_path),
        r"sections\.json: ": lambda: sections.read_sections(tmp_path),
        r"config\.json is a pipe": lambda: Workdir.existing(str(tmp_path)).read_record(),
        r"/d is a pipe or a device": lambda: manifest.read(step),
    }
    for message, read in reads.items():
        with pytest.raises(UserError, match=message):
            read()
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"config\.json: .*not a regular file"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("pipe", "others"),
    [
        ("vocab.json", {"merges.txt": "#version: 0.2\n"}),
        ("merges.txt", {"vocab.json": "{}"}),
        ("tokenizer.json", {}),
        ("spiece.model", {}),
    ],
)
def test_a_pipe_beside_weights_is_no_tokenizer(tmp_path, pipe, others):
    os.mkfifo(tmp_path / pipe)
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"is a pipe or a device|has no tokenizer"):
        tokenizer.open_tokenizer(str(tmp_path), 8)


def test_a_vocabulary_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\na\n", encoding="utf-8-sig")
    assert tokenizer.open_tokenizer(str(path), 3).encode(["a"]).tolist() == [[2, 3, 0]]


def test_a_link_in_the_folder_of_pictures_is_not_shown(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "report" / "own.png").write_bytes(b"own")
    (tmp_path / "report" / "link.png").symlink_to(tmp_path / "secret")
    entries = [{"title": name, "image": f"{name}.png"} for name in ("own", "link")]
    (tmp_path / "report" / "sections.json").write_text(json.dumps({"sections": entries}))
    found = sections.read_sections(tmp_path)
    assert [section.image for section in found] == [b"own", None]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
        ("[" * 100_000, "nested too deep"),
        ("1" * 301, "a number of 301 digits"),
        ("1" * 5000, "a number of 5000 digits"),
        ("{", "Expecting"),
    ],
)
def test_what_json_would_lose_or_choke_on_is_refused(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        storage.parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"config\.json is not JSON: .*{reason}"):
        files.read_json(tmp_path / "config.json")


def test_json_is_read_as_it_was_written():
    value = {"a": [1, 2.5, True, None, "x"], "b": {"c": 2**64}}
    assert storage.parse_json(storage.json_text(value, indent=2)) == value
    assert storage.parse_json(storage.json_text(value).encode()) == value


def test_json_has_no_numbers_that_are_not_finite():
    text = storage.json_text({"a": math.nan, "b": (math.inf, -math.inf), "c": 1.5})
    assert text == '{"a": "NaN", "b": ["Infinity", "-Infinity"], "c": 1.5}'


def test_output_goes_through_links_and_into_pipes(tmp_path):
    there, link, pipe = (tmp_path / name for name in ("there", "link", "pipe"))
    link.symlink_to(there)
    storage.write_output(str(link), "a")
    assert there.read_text() == "a"
    assert link.is_symlink()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    storage.write_output(str(pipe), "b")
    assert os.read(reader, 9) == b"b"
    os.close(reader)
    assert pipe.is_fifo()


def test_one_opening_of_a_file_gets_the_lock_where_there_are_locks(tmp_path, monkeypatch):
    with open(tmp_path / "a", "ab") as first, open(tmp_path / "a", "ab") as second:
        assert storage.try_lock(first.fileno()) is True
        assert storage.try_lock(second.fileno()) is False
        first.close()
        assert storage.try_lock(second.fileno()) is True

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open(tmp_path / "a", "ab") as file:
        assert storage.try_lock(file.fileno()) is None


def test_the_file_of_a_lock_that_is_no_json_names_nobody():
    for content in (b"\xff", b"[" * 100_000, b'{"pid": 1'):
        assert Holder.parse(content) == Holder()


@pytest.mark.parametrize("stored", [{"a": 1}, {"a": {"shape": [1], "dtype": "foo"}}])
def test_a_broken_description_of_a_checkpoint_is_one_line(tmp_path, stored):
    (tmp_path / "5" / "manifest").mkdir(parents=True)
    (tmp_path / "5" / "manifest" / "metadata").write_text(json.dumps({"arrays": stored}))
    with pytest.raises(UserError, match="metadata is broken or cut short"):
        evaluation_params.read(tmp_path, 5, None)


ODD_SHAPE = {"image": {"shape": ["x", None], "dtype": "uint8"}}


@pytest.mark.parametrize(
    "change", [{"version": math.inf}, {"num_classes": math.inf}, {"spec": ODD_SHAPE}]
)
def test_an_odd_number_in_a_config_is_one_line(tmp_path, change):
    info = {"spec": {}, "num_classes": 2, "class_names": None}
    record = {"version": 1, "config": {}, "data_info": info | change} | change
    (tmp_path / "config.json").write_text(json.dumps(record))
    workdir = Workdir.existing(str(tmp_path))
    with pytest.raises(UserError, match=r"config\.json cannot be read: (Overflow|Type)Error"):
        workdir.read_config() if "version" in change else workdir.read_info()


def test_names_from_files_do_not_act_on_the_terminal(capsys):
    show(f"a{CLEAR}\nb")
    assert capsys.readouterr().out == "a\\x1b[2J\nb\n"
    assert __main__._failed(UserError(f"config.{CLEAR}evil is unknown")) == 2
    assert capsys.readouterr().err == "error: config.\\x1b[2Jevil is unknown\n"
    record = logging.LogRecord("x", logging.WARNING, "", 0, "array %s", (f"a{CLEAR}",), None)
    assert __main__._Visible("%(levelname)s: %(message)s").format(record) == (
        "WARNING: array a\\x1b[2J"
    )
