"""Checkpoints of the hub, from a server on this machine that speaks its interface."""

import hashlib
import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from vit_jax import checkpoints, models
from vit_jax.checkpoints import hub, input_spec
from vit_jax.config import load
from vit_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub(http.server.ThreadingHTTPServer):
    """A hub with the files of `repos`: `{repository: {file: content}}`.

    Attributes:
      gated: repositories that ask for consent.
      cut: a file whose connection ends in its middle, once.
      fetched: the paths that were asked for.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.gated, self.cut, self.fetched = {}, set(), "", []

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers questions for a repository and for one of its files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        self.server.fetched.append(self.path)
        found = re.match(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/?]+))?", self.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
        repo, revision = (found or file)[1], (found[3] if found else file[2]) or "main"
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else "")
        contents = self.server.repos.get(repo)
        wrong = {
            "RepoNotFound": contents is None,
            "GatedRepo": repo in self.server.gated,
            "RevisionNotFound": not commit,
            "EntryNotFound": file and file[3] not in (contents or ()),
        }
        for code in (code for code, holds in wrong.items() if holds):
            status = 403 if code == "GatedRepo" else 404
            return self.begin(status, {"X-Error-Code": code, "Content-Length": "0"})
        if file:
            return self.send_file(file[3], contents[file[3]], commit, send)
        if found[2] == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                for name, data in contents.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in contents]
            rows = {"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        return self.send(json.dumps(rows).encode(), send, {})

    def send_file(self, name, data, commit, send):
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": commit}
        if not send or self.server.cut != name:
            return self.send(data, send, headers)
        self.server.cut, self.close_connection = "", True
        self.begin(200, {**headers, "Content-Length": str(len(data))})
        return self.wfile.write(data[: len(data) // 2])

    def send(self, data, send, headers):
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        part = data[int(first[1]) :] if first else data
        if first:
            headers = {
                **headers, "Content-Range": f"bytes {first[1]}-{len(data) - 1}/{len(data)}",
            }  # fmt: skip
        self.begin(206 if first else 200, {**headers, "Content-Length": str(len(part))})
        if send:
            self.wfile.write(part)

    def begin(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def digest(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def server(monkeypatch, tmp_path):
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub._fetched.cache_clear()
        yield server
        server.shutdown()
        thread.join()
    hub._fetched.cache_clear()


@pytest.fixture
def dinov2(server):
    """The server with a tiny DINOv2, as its repository on the hub."""
    folder = GOLDEN / "hf_tiny/dinov2"
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    server.repos["facebook/dinov2-base"] = contents
    return folder


def params_of(path, folder):
    model = models.build(**checkpoints.model_config(folder))
    return checkpoints.load(path, model)


def test_a_repository_is_read_as_its_folder(server, dinov2):
    address = "hf://facebook/dinov2-base"
    found, expected = params_of(address, dinov2), params_of(dinov2, dinov2)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert input_spec.read(address) == input_spec.read(dinov2)
    asked = len(server.fetched)
    assert checkpoints.model_config(address) == checkpoints.model_config(dinov2)
    assert len(server.fetched) == asked  # What is there is not fetched again.


def test_a_file_and_a_revision_can_be_named(server, dinov2):
    name = next(path.name for path in dinov2.glob("*.safetensors"))
    found = Path(hub.local_path(f"hf://facebook/dinov2-base/{name}@old"))
    assert found.read_bytes() == (dinov2 / name).read_bytes()
    assert "b" * 40 in str(found)


def test_names_of_models_are_addresses_unless_they_are_folders(tmp_path, monkeypatch):
    assert hub.address_of("facebook/dinov2-base") == "hf://facebook/dinov2-base"
    timm = "timm/vit_base_patch16_224.augreg_in21k"
    assert hub.address_of(f"hf-hub:{timm}") == f"hf://{timm}"
    for name in ("runs/digits", "vit_b16", "vit_b16.npz", "/facebook/dinov2-base", ""):
        assert hub.address_of(name) == ""
    monkeypatch.chdir(tmp_path)
    Path("facebook/dinov2-base").mkdir(parents=True)
    assert hub.address_of("facebook/dinov2-base") == ""


def test_a_name_of_the_hub_is_model_checkpoint_and_statistics(server, dinov2, request):
    del dinov2
    recipe = f"{request.config.rootpath}/configs/finetune.py"
    config = load(f"{recipe}:model=facebook/dinov2-base")
    assert config.model.name == "facebook/dinov2-base"
    assert config.init.checkpoint == "hf://facebook/dinov2-base"
    assert config.task.mean[0] == pytest.approx(0.485 * 255, abs=0.01)


def test_an_interrupted_download_leaves_nothing_and_works_the_next_time(server, dinov2):
    server.cut = next(path.name for path in dinov2.glob("*.safetensors"))
    name = f"hf://facebook/dinov2-base/{server.cut}"
    try:
        found = hub.local_path(name)
    except UserError:
        found = hub.local_path(name)
    assert Path(found).read_bytes() == (dinov2 / Path(found).name).read_bytes()


def test_a_hostile_list_of_files_writes_nothing_outside_the_cache(server, dinov2, tmp_path):
    server.repos["facebook/dinov2-base"]["../../../../config.json"] = b"{}"
    server.repos["facebook/dinov2-base"]["run.py"] = b"raise SystemExit"
    try:
        folder = Path(hub.local_path("hf://facebook/dinov2-base"))
    except UserError:
        folder = None
    assert not list(tmp_path.glob("*.json"))
    assert not list(tmp_path.parent.glob("*.json"))
    if folder:
        assert not (folder / "run.py").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://facebook", "write hf://USER/REPO"),
        ("hf://facebook/dinov2-base@gone", "no such branch, tag or commit"),
        ("hf://facebook/dinov2-base/gone.npz", "no such file"),
        ("hf://nobody/nothing", "no such repository"),
        ("hf://meta/gated", "asks for consent"),
        ("hf://user/empty", "no weights under their usual names"),
        ("hf://us er/repo", "cannot be fetched"),
    ],
)
def test_what_is_not_there_is_one_line(server, dinov2, address, message):
    del dinov2
    server.repos["meta/gated"] = {}
    server.gated.add("meta/gated")
    server.repos["user/empty"] = {"README.md": b""}
    with pytest.raises(UserError, match=message) as caught:
        hub.local_path(address)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(address)


def test_without_the_hub_what_was_fetched_is_used(server, dinov2, monkeypatch):
    folder = hub.local_path("hf://facebook/dinov2-base")
    hub._fetched.cache_clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # Nothing answers there.
    assert hub.local_path("hf://facebook/dinov2-base") == folder
    shutil.rmtree(Path(folder).parents[1])
    hub._fetched.cache_clear()
    with pytest.raises(UserError, match="cannot be reached, and the files have not been fetched"):
        hub.local_path("hf://facebook/dinov2-base")
