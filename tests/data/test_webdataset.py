"""Tar shards of WebDataset: samples, labels, and the index of each shard."""

import functools
import http.server
import io
import json
import os
import re
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image
from tar_files import idx_of, tar_of

from vit_jax.__main__ import main
from vit_jax.data import element_spec, open_source
from vit_jax.data.sources import _tar_index, _tar_table
from vit_jax.errors import UserError


def png(value):
    buffer = io.BytesIO()
    Image.new("L", (3, 2), value).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    for shard in range(2):
        members = []
        for number in range(3 * shard, 3 * shard + 3):
            label = json.dumps({"label": "ab"[number % 2], "who": number // 2}).encode()
            members += [
                (f"x/{number:03}.cls", b"%d\n" % (number % 2)),
                (f"x/{number:03}.json", label),
            ]
            members += [(f"x/{number:03}.png", png(10 * number)), (f"x/._{number}.png", b"x")]
        (tmp_path / f"train-{shard}.tar").write_bytes(tar_of(members))
    return str(tmp_path / "{split}-*.tar")


def open_shards(name, **args):
    return open_source({"source": "webdataset", "name": name, **args})


def numbers(source):
    encoded = source.fetch(np.arange(len(source)))["image"]
    return [Image.open(io.BytesIO(data)).getpixel((0, 0)) // 10 for data in encoded]


def test_samples_of_all_shards_are_at_hand(shards):
    source = open_shards(shards)
    assert numbers(source) == [0, 1, 2, 3, 4, 5]
    assert source.class_names == ("a", "b")
    assert source.fetch(np.array([5, 2]))["label"].tolist() == [1, 0]
    assert source.describe(4).endswith("train-1.tar: x/004")
    assert element_spec(source, "decode")["image"].shape == (2, 3, 3)
    by_number = open_shards(shards, label="cls", class_names=["cat", "dog"], split="train[1:3]")
    assert by_number.class_names == ("cat", "dog")
    assert by_number.fetch(np.arange(2))["label"].tolist() == [1, 0]
    assert len(open_shards(shards, split="train[fold 1 of 3]", group="who")) == 2


def test_an_index_is_kept_in_a_cache_and_made_anew_when_a_shard_changes(
    shards, tmp_path, monkeypatch
):
    before = sorted(os.listdir(tmp_path))
    open_shards(shards)
    assert sorted(os.listdir(tmp_path)) == before
    with monkeypatch.context() as patch:
        patch.setattr(_tar_index.tarfile, "open", None)
        assert numbers(open_shards(shards)) == [0, 1, 2, 3, 4, 5]
    for kept in os.scandir(_tar_index.CACHE):
        with open(kept, "wb") as file:
            file.write(b"damaged")
    assert numbers(open_shards(shards)) == [0, 1, 2, 3, 4, 5]
    (tmp_path / "train-0.tar").write_bytes(tar_of([("9.cls", b"1"), ("9.png", png(90))]))
    assert numbers(open_shards(shards, label="cls")) == [9, 3, 4, 5]


def test_a_shard_is_read_where_its_index_cannot_be_kept(shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(_tar_index, "CACHE", str(tmp_path / "file"))
    assert numbers(open_shards(shards)) == [0, 1, 2, 3, 4, 5]


def test_prepare_writes_the_index_of_every_shard_beside_it(shards, tmp_path, monkeypatch, capsys):
    (tmp_path / "val-0.tar").write_bytes((tmp_path / "train-0.tar").read_bytes())
    for _ in range(2):
        assert main(["prepare", shards]) == 0
        out, err = capsys.readouterr()
        assert out.strip() == str(tmp_path)
        assert "train-1.tar (2 of 3): 3 samples" in err
        monkeypatch.setattr(_tar_index.tarfile, "open", None)
    monkeypatch.setattr(_tar_index, "CACHE", "/dev/null")
    assert numbers(open_shards(shards)) == [0, 1, 2, 3, 4, 5]
    assert main(["prepare", shards, "--check"]) == 2
    assert "--check is for datasets of TFDS, not for tar files" in capsys.readouterr().err
    assert main(["prepare", "https://example.invalid/a.tar"]) == 2
    assert "nothing can be written beside files on the web" in capsys.readouterr().err
    assert main(["prepare", str(tmp_path / "other-*.tar")]) == 2
    assert "no such file" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(_tar_index, "SUFFIX", "/no/folder")
    assert main(["prepare", shards]) == 2
    assert "/no/folder: Not a directory" in capsys.readouterr().err


def test_a_member_of_a_negative_size_ends_in_one_line(tmp_path, monkeypatch):
    """It would lead back to where a header was read already (as in CVE-2025-8194)."""
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\0"
    for kind, name in ((b"5", b"x"), (b"0", b".x"), (b"0", b"x")):
        header[:3], header[156:157] = name.ljust(3, b"\0"), kind
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(2048))
        for index in ("v1.2 1\ncls 1536 1 a.cls\n", ""):
            (tmp_path / "a.idx").write_text(index)
            with pytest.raises(UserError, match=r"a\.tar: "):
                _tar_index.of(str(tmp_path / "a.tar"))


def test_a_line_of_an_index_takes_no_time_beyond_its_length(tmp_path):
    assert _tar_index._parsed("v1.2 1\n" + "a" * 90_000) == []
    assert _tar_index._parsed("v1.2 1\n" + "a 1 1 " * 15_000) == []
    assert _tar_index._parsed("v1.2 1\n" + "a 1 1 b.a " * 20_000) == []


def test_two_images_of_a_sample_are_refused(tmp_path):
    members = [("k.png", png(10)), ("k.cls", b"0"), ("k.jpg", png(20))]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    with pytest.raises(UserError, match=r"a\.tar: the sample 'k' has two images; call what is no"):
        open_shards(str(tmp_path / "a.tar"))
    members = [("k.a.png", png(10)), ("k.b.png", png(10)), ("k.png", png(70)), ("k.cls", b"0")]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert numbers(open_shards(str(tmp_path / "a.tar"), label="cls")) == [7]


@pytest.mark.parametrize("tells", [True, False])
def test_a_remote_shard_that_changed_is_read_anew(tmp_path, monkeypatch, tells):
    """Tar files are padded, so that a label that is set right does not change the size."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send_header(self, name, value):
            if tells or name != "Last-Modified":
                super().send_header(name, value)

    monkeypatch.setattr(_tar_index, "CACHE", str(tmp_path / "cache"))
    serve = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.tar"
        for label in (b"0", b"1"):
            (tmp_path / "a.tar").write_bytes(tar_of([("k.png", png(0)), ("k.cls", label)]))
            os.utime(tmp_path / "a.tar", (0, 10**9 + int(label)))
            assert list(_tar_index.of(address).cls) == [label.decode()]
        assert (tmp_path / "cache").exists() == tells
        server.shutdown()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_of_dali_gives_that_of_the_headers(tmp_path, monkeypatch, kind):
    path, index = tmp_path / "a.tar", tmp_path / "a.idx"
    long = "" if kind == tarfile.USTAR_FORMAT else "x" * 120
    long = "é" if kind == tarfile.PAX_FORMAT else long
    members = [
        (f"x y/{number}{long}.{end}", content)
        for number in range(3)
        for end, content in (("png", png(10 * number)), ("cls", b"%d" % number))
    ]
    members += [("x y/._9.png", b"?"), ("x y/7.png", png(70)), ("x y/7.cls", b"7")]
    path.write_bytes(tar_of(members, kind, mtime=0.5))
    expected = _tar_index.of(str(path))
    right = idx_of(path.read_bytes())
    monkeypatch.setattr(_tar_index, "CACHE", "/dev/null")
    lines = right.splitlines(keepends=True)
    wrong = {
        "another version": right.replace("v1.2", "v1.1"),
        "half": right[: len(right) // 2],
        "one sample less": f"v1.2 3\n{''.join([*lines[1:2], *lines[3:]])}",
        "the last sample less": f"v1.2 3\n{''.join(lines[1:-1])}",
        "in another order": idx_of(path.read_bytes(), lambda members: members[::-1]),
        "other places": re.sub(r"png (\d+)", lambda x: f"png {int(x[1]) + 512}", right, count=1),
        "beyond the file": right.replace(" 1 x y/7.cls", " 99999 x y/7.cls"),
        "other names": right.replace("x y/7", "x y/8"),
        "no text": "\udcff",
    }
    for text in (*wrong.values(), right):
        index.write_bytes(text.encode("utf-8", "surrogateescape"))
        with monkeypatch.context() as patch:
            if text == right:
                patch.setattr(_tar_index.tarfile, "open", None)
            found = _tar_index.of(str(path))
        for column, value in expected._asdict().items():
            np.testing.assert_array_equal(found._asdict()[column], value)


def test_shards_are_opened_once_and_only_some_stay_open(shards, monkeypatch):
    source = open_shards(shards)
    opened, closed, really_open, really_close = [], [], os.open, os.close
    monkeypatch.setattr(
        os, "open", lambda path, flags: opened.append(path) or really_open(path, flags)
    )
    assert numbers(source) == numbers(source) == [0, 1, 2, 3, 4, 5]
    assert [path[-5:] for path in opened] == ["0.tar", "1.tar"]
    monkeypatch.setattr(_tar_table, "_MAX_OPEN", 1)
    source = open_shards(shards)
    monkeypatch.setattr(os, "close", lambda file: closed.append(file) or really_close(file))
    del opened[:]
    assert numbers(source) == numbers(source) == [0, 1, 2, 3, 4, 5]
    assert len(opened) == 4
    assert len(closed) == 3


def test_the_image_of_a_sample_has_the_shortest_ending(tmp_path):
    members = [
        ("1.mask.png", png(10)),
        ("1.png", png(70)),
        ("1.depth.png", png(20)),
        ("1.cls", b"0"),
    ]
    (tmp_path / "a.tar").write_bytes(tar_of([*members, ("2.crop.png", png(30)), ("2.cls", b"1")]))
    assert numbers(open_shards(str(tmp_path / "a.tar"), label="cls")) == [7, 3]


def test_no_sample_is_left_out_in_silence(tmp_path):
    empty = [("1.png", png(10)), ("1.cls", b"0"), ("2.png", b""), ("2.cls", b"1")]
    (tmp_path / "a.tar").write_bytes(tar_of(empty))
    source = open_shards(str(tmp_path / "a.tar"), label="cls")
    assert len(source) == 2
    with pytest.raises(OSError, match="the file is empty"):
        source.fetch(np.array([1]))
    (tmp_path / "b.tar").write_bytes(tar_of([*empty, ("x/3.jp2", b"x"), ("x/3.cls", b"1")]))
    with pytest.raises(UserError, match=r"'x/3.jp2' has a format that is not read: convert it"):
        open_shards(str(tmp_path / "b.tar"), label="cls")
    (tmp_path / "c.tar").write_bytes(tar_of([("4.png", png(40)), ("4.jp2", b"x"), ("4.cls", b"1")]))
    assert numbers(open_shards(str(tmp_path / "c.tar"), label="cls")) == [4]


def test_what_is_wrong_is_named(shards, tmp_path):
    for content, message in (
        (b"no tar" * 200, "no tar file, or a damaged one"),
        (b"", "no tar file, or a damaged one|no samples with images"),
    ):
        (tmp_path / "val-0.tar").write_bytes(content)
        with pytest.raises(UserError, match=message) as raised:
            open_shards(shards, split="val")
        assert "val-0.tar" in str(raised.value)
    (tmp_path / "val-0.tar").write_bytes(tar_of([("1.cls", b"0")]))
    with pytest.raises(UserError, match="no samples with images"):
        open_shards(shards, split="val")
    (tmp_path / "val-0.tar").write_bytes(tar_of([("1.png", png(1)), ("1.cls", b"")]))
    with pytest.raises(UserError, match=r"val-0.tar: 1, column 'cls': has no label"):
        open_shards(shards, split="val", label="cls")
    (tmp_path / "val-0.tar").write_bytes(tar_of([("1.png", png(1)), ("1.cls", b"0")]))
    source = open_shards(shards, split="val", label="cls")
    (tmp_path / "val-0.tar").write_bytes(b"")
    with pytest.raises(OSError, match="ends within the image"):
        source.fetch(np.array([0]))
