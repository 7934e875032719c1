"""Checkpoints of the hub, from a server on this machine that speaks its interface."""

import contextlib
import shutil
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest

from vit_jax import checkpoints, models
from vit_jax.checkpoints import hub, input_spec
from vit_jax.config import load
from vit_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def dinov2(hub_server):
    """The server with a tiny DINOv2, as its repository on the hub."""
    folder = GOLDEN / "hf_tiny/dinov2"
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    hub_server.repos["facebook/dinov2-base"] = contents
    return folder


def params_of(path, folder):
    model = models.build(**checkpoints.model_config(folder))
    return checkpoints.load(path, model)


def test_a_repository_is_read_as_its_folder(hub_server, dinov2):
    address = "hf://facebook/dinov2-base"
    found, expected = params_of(address, dinov2), params_of(dinov2, dinov2)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert input_spec.read(address) == input_spec.read(dinov2)
    asked = len(hub_server.fetched)
    assert checkpoints.model_config(address) == checkpoints.model_config(dinov2)
    assert len(hub_server.fetched) == asked  # What is there is not fetched again.


def test_a_file_and_a_revision_can_be_named(hub_server, dinov2):
    name = next(path.name for path in dinov2.glob("*.safetensors"))
    found = Path(hub.local_path(f"hf://facebook/dinov2-base/{name}@old"))
    assert found.read_bytes() == (dinov2 / name).read_bytes()
    assert "b" * 40 in str(found)


def test_the_commit_of_what_a_config_names_is_known(dinov2):
    hub.local_path("hf://facebook/dinov2-base")
    hub.local_path("hf://facebook/dinov2-base@old", weights=False)
    config = {"init": {"checkpoint": "facebook/dinov2-base"}, "data": ["hf://datasets/a/b", 1]}
    config["pp"] = "decode|" * 60  # Longer than the name of a file may be.
    assert hub.commits_in(config) == {"hf://facebook/dinov2-base": "a" * 40}
    old = "hf://facebook/dinov2-base@old"
    assert hub.commits_in(f"decode|tokenize('{old}')") == {old: "b" * 40}


def test_names_of_models_are_addresses_unless_they_are_folders(tmp_path, monkeypatch):
    assert hub.address_of("facebook/dinov2-base") == "hf://facebook/dinov2-base"
    timm = "timm/vit_base_patch16_224.augreg_in21k"
    for name in (timm, f"hf-hub:{timm}", timm.removeprefix("timm/")):
        assert hub.address_of(name) == f"hf://{timm}"
    for name in ("runs/digits", "vit_b16", "vit_b16.npz", "/facebook/dinov2-base", ""):
        assert hub.address_of(name) == ""
    monkeypatch.chdir(tmp_path)
    Path("facebook/dinov2-base").mkdir(parents=True)
    assert hub.address_of("facebook/dinov2-base") == ""


def test_a_name_of_the_hub_is_model_checkpoint_and_statistics(hub_server, dinov2, request):
    del dinov2
    recipe = f"{request.config.rootpath}/configs/finetune.py"
    config = load(f"{recipe}:model=facebook/dinov2-base")
    assert config.model.name == "facebook/dinov2-base"
    assert config.init.checkpoint == "hf://facebook/dinov2-base"
    assert config.task.mean[0] == pytest.approx(0.485 * 255, abs=0.01)


def test_an_interrupted_download_leaves_nothing_and_works_the_next_time(hub_server, dinov2):
    hub_server.cut = name = next(path.name for path in dinov2.glob("*.safetensors"))
    try:
        found = hub.local_path(f"hf://facebook/dinov2-base/{name}")
    except UserError:
        found = hub.local_path(f"hf://facebook/dinov2-base/{name}")
    assert hub_server.cut == ""
    assert Path(found).read_bytes() == (dinov2 / name).read_bytes()


def test_a_description_is_fetched_without_the_weights_and_beside_a_file(hub_server, dinov2):
    assert input_spec.read("hf://facebook/dinov2-base") == input_spec.read(dinov2)
    assert not any(path.endswith(".safetensors") for path in hub_server.fetched)
    name = next(path.name for path in dinov2.glob("*.safetensors"))
    found = Path(hub.local_path(f"hf://facebook/dinov2-base/{name}"))
    assert (found.parent / "config.json").exists()


@pytest.mark.parametrize("name", ["../../../../evil.model", "/evil.model", "a/../../evil.model"])
def test_a_hostile_list_of_files_writes_nothing_outside_the_cache(
    hub_server, dinov2, tmp_path, name
):
    hub_server.repos["facebook/dinov2-base"] |= {name: b"{}", "run.py": b"raise SystemExit"}
    with contextlib.suppress(UserError):
        folder = Path(hub.local_path("hf://facebook/dinov2-base"))
        assert not (folder / "run.py").exists()
    assert any("dinov2-base" in path for path in hub_server.fetched)
    cache = tmp_path / "cache"
    outside = [path for path in tmp_path.rglob("evil*") if cache not in path.parents]
    assert outside == []
    assert not Path("/evil.model").exists()
    assert not list(tmp_path.parent.glob("evil*"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://facebook", "write hf://USER/REPO"),
        ("hf://facebook/dinov2-base@gone", "no such branch, tag or commit"),
        ("hf://facebook/dinov2-base/gone.npz", "no such file"),
        ("hf://nobody/nothing", "no such repository"),
        ("hf://meta/gated", "asks for consent"),
        ("hf://user/empty", "no weights under their usual names"),
        ("hf://us er/repo", "huggingface_hub says"),
    ],
)
def test_what_is_not_there_is_one_line(hub_server, dinov2, address, message):
    del dinov2
    hub_server.repos["meta/gated"] = {}
    hub_server.gated.add("meta/gated")
    hub_server.repos["user/empty"] = {"README.md": b""}
    with pytest.raises(UserError, match=message) as caught:
        hub.local_path(address)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(address)


def test_without_the_hub_what_was_fetched_is_used(hub_server, dinov2, monkeypatch):
    folder = hub.local_path("hf://facebook/dinov2-base")
    hub._fetched.cache_clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # Nothing answers there.
    assert hub.local_path("hf://facebook/dinov2-base") == folder
    shutil.rmtree(Path(folder).parents[1])
    hub._fetched.cache_clear()
    with pytest.raises(UserError, match="cannot be reached, and the files have not been fetched"):
        hub.local_path("hf://facebook/dinov2-base")


def test_a_transfer_by_xet_that_fails_says_how_to_do_without(monkeypatch):
    def xet_get(url, path):
        raise ConnectionError("Network error: no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: xet_get("", ""))
    with pytest.raises(UserError, match=r"no route; if its .* set HF_HUB_DISABLE_XET=1") as caught:
        checkpoints.model_config("hf://facebook/dinov2-base")
    assert "\n" not in str(caught.value)
