"""A run's model on the hub answers as the run does."""

import json

import numpy as np
import pytest
from huggingface_hub import constants

from vit_jax.__main__ import main
from vit_jax.checkpoints import input_spec, loading
from vit_jax.checkpoints.fit.inference import infer_model
from vit_jax.errors import UserError
from vit_jax.inference.predict import Predictor
from vit_jax.inference.push import push

IMAGES = [np.random.default_rng(n).integers(0, 256, (8, 8, 3), np.uint8) for n in range(3)]


def test_a_pushed_run_answers_as_before(hub_server, tiny_config, left_by_a_run, tmp_path, capsys):
    run = tmp_path / "run"
    left_by_a_run(tiny_config(data__eval_pp="decode|resize(8)"), run, classes=("a", "b|c", "d"))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/val/accuracy": 0.5}) + "\n")
    record = json.loads((run / "config.json").read_text())
    record["command"] = ["vit-jax", "train", "--config.data.name=caf\udce9"]  # Not UTF-8.
    (run / "config.json").write_text(json.dumps(record))
    assert main(["push", str(run), "hf://me/digits"]) == 0
    assert "read it back as hf://me/digits" in capsys.readouterr().out
    found = Predictor.from_checkpoint("hf://me/digits")
    expected = Predictor.from_workdir(str(run)).predict(IMAGES)["probability"]
    np.testing.assert_allclose(found.predict(IMAGES)["probability"], expected, atol=1e-6)
    assert found.info.class_names == ("a", "b|c", "d")
    repository = hub_server.repos["me/digits"]
    card = repository["README.md"].decode()
    for part in (
        "library_name: transformers", "| `val/accuracy` | 0.5", "decode|resize(8)", "caf\\udce9",
        "folder = snapshot_download('me/digits')\nmodel = transformers.ViTForImageClassification"
        ".from_pretrained(folder)\n",
    ):  # fmt: skip
        assert part in card
    assert json.loads(repository["vit_jax_config.json"])["model"]["name"] == "vit"


def test_a_step_of_a_run_is_pushed_with_its_own_metrics(
    hub_server, tiny_config, left_by_a_run, tmp_path, capsys
):
    run = tmp_path / "run"
    left_by_a_run(tiny_config(), run)
    rows = [{"step": step, "eval/val/accuracy": step / 4} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["push", str(run), "hf://me/digits", "--step=1"]) == 0
    card = hub_server.repos["me/digits"]["README.md"].decode()
    assert "Last evaluation until step 1" in card
    assert "| `val/accuracy` | 0.25" in card
    assert main(["push", str(run), "hf://me/digits", "--step=7"]) == 2
    assert "has no step 7; it has [1]" in capsys.readouterr().err


def test_independent_classes_come_back_as_such(hub_server, tiny_config, left_by_a_run, tmp_path):
    run = tmp_path / "run"
    left_by_a_run(tiny_config(task__loss="sigmoid", data__eval_pp="decode|resize(8)"), run)
    assert main(["push", str(run), "hf://me/digits"]) == 0
    expected = Predictor.from_workdir(str(run)).predict(IMAGES)["probability"]
    for path in ("hf://me/digits", str(run / "checkpoints/1")):
        found = Predictor.from_checkpoint(path).predict(IMAGES)["probability"]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(expected.sum(1), 1)


def test_a_model_that_transformers_cannot_have_goes_as_a_file(
    hub_server, tiny_config, left_by_a_run, tmp_path
):
    run = tmp_path / "run"
    fields = {"task__mean": (100.0,), "task__std": (50.0,), "model__num_registers": 2}
    left_by_a_run(tiny_config(model__pooling="mean", **fields), run, classes=("a", "b", "c"))
    hub_server.repos["me/other"] = {"model.npz": b"", "config.json": b"", "notes.txt": b""}
    assert main(["push", str(run), "hf://me/other@dev"]) == 0
    assert {"model.npz", "notes.txt"} & hub_server.repos["me/other"].keys() == {"notes.txt"}
    address = "hf://me/other/model.safetensors@dev"
    assert f"--checkpoint={address}" in hub_server.repos["me/other"]["README.md"].decode()
    found = Predictor.from_checkpoint(address)
    assert found.info.class_names == ("a", "b", "c")
    assert found.task.mean == (100.0,)
    expected = Predictor.from_workdir(str(run)).predict(IMAGES)["probability"]
    np.testing.assert_allclose(found.predict(IMAGES)["probability"], expected, atol=1e-6)


OTHER = {"model__pooling": "mean", "model__num_registers": 2}
"""A model that transformers has no class for and timm's plain ViT is."""


def test_timm_finds_its_own_keys_beside_ours(hub_server, tiny_config, left_by_a_run, tmp_path):
    """Those that `timm.models._hub` reads; `timm.create_model` makes the model of them."""
    statistics = {"task__mean": (100.0,), "task__std": (51.0,)}
    left_by_a_run(tiny_config(**OTHER, **statistics), tmp_path / "run", classes=("a", "b", "c"))
    assert main(["push", str(tmp_path / "run"), "hf://me/other@dev"]) == 0
    repository = hub_server.repos["me/other"]
    stored = json.loads(repository["config.json"])
    assert stored["architecture"].startswith("vit_")
    assert stored["pretrained_cfg"]["input_size"] == [3, 8, 8]
    assert stored["pretrained_cfg"]["std"] == [0.2] * 3
    assert stored["label_names"] == ["a", "b", "c"]
    card = repository["README.md"].decode()
    assert "library_name: timm\n" in card
    assert "timm.create_model('hf-hub:me/other@dev', pretrained=True)" in card
    # `predict` prepares images as the run did, and not as timm's keys tell.
    (tmp_path / "config.json").write_bytes(repository["config.json"])
    assert input_spec.read(tmp_path / "model.safetensors").size is None
    # Reading the folder follows timm's keys; reading the file follows its own header.
    (tmp_path / "model.safetensors").write_bytes(repository["model.safetensors"])
    models = [
        infer_model(loading.read_weights(path))
        for path in (tmp_path, tmp_path / "model.safetensors")
    ]
    assert models[0] == models[1]
    assert (models[0].backbone.pooling, models[0].backbone.num_registers) == ("mean", 2)


def test_what_json_cannot_tell_timm_is_a_call_of_the_card(
    hub_server, tiny_config, left_by_a_run, tmp_path
):
    left_by_a_run(tiny_config(**OTHER, model__norm_epsilon=1e-5), tmp_path / "run")
    assert main(["push", str(tmp_path / "run"), "hf://me/other@dev"]) == 0
    repository = hub_server.repos["me/other"]
    assert "architecture" not in json.loads(repository["config.json"])
    card = repository["README.md"].decode()
    for part in (
        "library_name: vit_jax\n",
        "import functools\n\nimport timm\n",
        "folder = snapshot_download('me/other', revision='dev')\n",
        "checkpoint_path=folder + '/model.safetensors', ",
        "norm_layer=functools.partial(timm.layers.LayerNorm, eps=1e-05)",
    ):
        assert part in card


def test_fixed_positions_go_with_the_size_of_the_run(
    hub_server, tiny_config, left_by_a_run, tmp_path
):
    left_by_a_run(tiny_config(model__position="sincos2d"), tmp_path / "run")
    assert main(["push", str(tmp_path / "run"), "hf://me/sincos"]) == 0
    assert "config.json" in hub_server.repos["me/sincos"]


def test_nothing_tells_of_this_machine(hub_server, tiny_config, left_by_a_run, tmp_path):
    run = tmp_path / "run"
    config = tiny_config(data__name="/home/alice/se`cret/d.npz", init__checkpoint="gs://b/alice/x")
    left_by_a_run(config, run)
    record = json.loads((run / "config.json").read_text())
    record["command"] = ["vit-jax", "train", "--workdir=/home/alice/runs/a", "~/alice/b```\n# c"]
    (run / "config.json").write_text(json.dumps(record))
    assert main(["push", str(run), "hf://me/digits"]) == 0
    for name, data in hub_server.repos["me/digits"].items():
        if not name.startswith("model."):
            assert b"alice" not in data, name
    card = hub_server.repos["me/digits"]["README.md"].decode()
    assert "--workdir=a" in card
    assert "`d.npz`" in card


def test_a_public_repository_does_not_become_private(run_to_push, hub_server, capsys):
    hub_server.repos["me/digits"] = {}
    assert main(["push", str(run_to_push), "hf://me/digits", "--private"]) == 2
    assert "is there already and is public; nothing was uploaded" in capsys.readouterr().err
    assert hub_server.repos["me/digits"] == {}
    assert main(["push", str(run_to_push), "hf://me/hidden", "--private"]) == 0
    assert "me/hidden" in hub_server.private


def test_large_files_go_before_the_commit_that_names_them(run_to_push, hub_server, monkeypatch):
    """The protocol of Git LFS; that of Xet needs a server of its own."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub_server.large = (".safetensors", ".npz")
    hub_server.refuses = "lfs"
    with pytest.raises(UserError, match=r"hf://me/digits: huggingface_hub says: .*403"):
        push(str(run_to_push), "hf://me/digits")
    assert hub_server.repos["me/digits"] == {}  # There is no model without its weights.
    hub_server.refuses = "commit"
    with pytest.raises(UserError, match=r"hf://me/digits: huggingface_hub says: .*403"):
        push(str(run_to_push), "hf://me/digits")
    assert hub_server.repos["me/digits"] == {}
    assert len(hub_server.uploaded) == 1
    hub_server.refuses = ""
    assert f"commit {'a' * 10};" in push(str(run_to_push), "hf://me/digits")
    (weights,) = hub_server.uploaded.values()
    assert hub_server.repos["me/digits"]["model.safetensors"] == weights


def test_a_card_names_the_checkpoint_that_training_started_from(run_to_push, hub_server):
    record = json.loads((run_to_push / "config.json").read_text())
    record["config"]["init"]["checkpoint"] = "hf://facebook/dinov2-small"
    record["hub_commits"] = {"hf://facebook/dinov2-small": "b" * 40}
    (run_to_push / "config.json").write_text(json.dumps(record))
    push(str(run_to_push), "hf://me/digits")
    card = hub_server.repos["me/digits"]["README.md"].decode()
    assert "base_model: facebook/dinov2-small\n---\n" in card
    assert f"It started from `facebook/dinov2-small` at commit {'b' * 40}." in card


def test_the_card_has_the_devices_and_the_time_until_the_step(run_to_push, hub_server):
    rows = [{"step": step, "train/run_seconds": 65.0 * step} for step in (1, 2)]
    (run_to_push / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = json.loads((run_to_push / "config.json").read_text())
    record["devices"] = {"kind": "TPU v5 lite", "count": 8}
    (run_to_push / "config.json").write_text(json.dumps(record))
    push(str(run_to_push), "hf://me/digits")
    card = hub_server.repos["me/digits"]["README.md"].decode()
    assert "had 8 devices (`TPU v5 lite`). It took 1m 05s until step 1, which includes" in card


def test_a_run_that_recorded_neither_devices_nor_time_is_pushed(run_to_push, hub_server):
    """As earlier versions left it."""
    record = json.loads((run_to_push / "config.json").read_text())
    del record["devices"]
    (run_to_push / "config.json").write_text(json.dumps(record))
    push(str(run_to_push), "hf://me/digits")
    card = hub_server.repos["me/digits"]["README.md"].decode()
    assert "device" not in card
    assert "It took" not in card


@pytest.fixture
def run_to_push(hub_server, tiny_config, left_by_a_run, tmp_path):
    del hub_server
    left_by_a_run(tiny_config(), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("path", "address", "message"),
    [
        ("gone", "hf://me/digits", "/gone holds no run"),
        ("run", "me/digits", "write hf://USER/REPO"),
        ("run", "hf://me/digits/file", "write hf://USER/REPO"),
    ],
)
def test_mistakes_are_one_line(run_to_push, capsys, path, address, message):
    assert main(["push", str(run_to_push.parent / path), address]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "--" not in said  # `push` takes the workdir without a flag.
    assert len(said.strip().splitlines()) == 1
