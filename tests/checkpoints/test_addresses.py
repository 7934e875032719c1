"""Checkpoints behind an address, from a server on this machine that cannot seek."""

import functools
import http.server
import threading

import jax
import numpy as np
import pytest
from models_to_save import build

from vit_jax import checkpoints
from vit_jax.checkpoints import files, loading
from vit_jax.errors import UserError


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """(folder, address under which its files are served)."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_files_behind_an_address(served):
    folder, address = served
    model, params, _ = build("token")
    for name, to in (("c.npz", "npz"), ("c.safetensors", "timm")):
        checkpoints.save(params, model, folder / name, to)
        back = checkpoints.load(f"{address}/{name}", model)
        jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(UserError, match=r"cannot read http://.*absent\.npz"):
        checkpoints.load(f"{address}/absent.npz", model)
    (folder / "cut.npz").write_bytes((folder / "c.npz").read_bytes()[:999])
    with pytest.raises(UserError, match="broken or cut short"):
        checkpoints.load(f"{address}/cut.npz", model)


def test_trouble_with_a_store_is_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("no credentials\nmany more lines")

    model, _, _ = build("token")
    monkeypatch.setattr(loading.epath, "Path", type("Path", (), {
        "__init__": lambda *_: None, "expanduser": lambda self: self, "exists": fail,
        "open": fail}))  # fmt: skip
    with pytest.raises(UserError, match=r"cannot read gs://bucket/c\.npz: no credentials$"):
        checkpoints.load("gs://bucket/c.npz", model)
    with pytest.raises(UserError, match=r"cannot read gs://bucket/index\.csv: no credentials$"):
        files.read_bytes("gs://bucket/index.csv")
    with pytest.raises(UserError, match="cannot read nothing://"):
        checkpoints.load("nothing://c.npz", model)
