"""The recipes on digit scenes, from pre-training to pictures of predictions, shrunk to seconds."""

from pathlib import Path

import pytest
from PIL import Image

from vit_jax.__main__ import main
from vit_jax.data.builders._scenes import draw_scene

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "total": 2,
    "batch_size": 2,
    "model.width": 16,
    "model.depth": 1,
    "model.num_heads": 1,
    "model.mlp_dim": 16,
    "model.unroll": 1,
    "model.stages": "()",
    "model.width_factor": 0.5,
    "optim.schedule.warmup": 1,
    "log.tensorboard": "false",
    "log.pictures": "false",
    "eval.every": 2,
    "checkpoint.every": 2,
    "compilation_cache": "",
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(draw_scene(1, 0, split="test", side=32).image).save(path)
    return str(path)


def run(config, workdir, **more):
    keys = [f"--config.{key}={value}" for key, value in {**SMALL, **more}.items()]
    assert main(["train", f"--config={CONFIGS}/{config}", f"--workdir={workdir}", *keys]) == 0


@pytest.mark.usefixtures("one_device")
def test_a_segmenter_trains_and_draws(scenes_dir, scene, tmp_path):
    run(f"segment_scenes.py:dir={scenes_dir}", tmp_path / "run")
    predict_and_draw(tmp_path / "run", scene, tmp_path / "drawn.png")


@pytest.mark.soak
@pytest.mark.usefixtures("one_device")
def test_two_towers_train_and_tell_which_text_fits(scenes_dir, scene, tmp_path, capsys):
    text = {"task.text.width": 8, "task.text.depth": 1, "task.text.num_heads": 1}
    run(f"contrast_scenes.py:lit,dir={scenes_dir}", tmp_path / "run", **text)
    ask = ["predict", f"--workdir={tmp_path}/run", scene]
    capsys.readouterr()
    assert main([*ask, "--text=a 3 above a 7", "--text=a 3, a 4 and a 5 from top to bottom"]) == 0
    name, *lines = capsys.readouterr().out.splitlines()
    assert name == scene
    assert {line.split("  ")[-1][:5] for line in lines} == {"a 3 a", "a 3, "}
    assert main(ask) == 2
    assert "write --text=TEXT once for each" in capsys.readouterr().err


@pytest.mark.soak
@pytest.mark.usefixtures("one_device")
def test_one_backbone_is_pretrained_for_every_task(scenes_dir, scene, tmp_path, capsys):
    run(f"scene_digits.py:dir={scenes_dir}", tmp_path / "digits")
    given = f"dir={scenes_dir},checkpoint={tmp_path}/digits"
    for name in ("segment_scenes.py:", "segment_scenes.py:head=mask,", "detect_scenes.py:"):
        check_transfer(name + given, scene, tmp_path / name, capsys)
    check_transfer(f"detect_scenes.py:head=tokens,{given}", scene, tmp_path / "tokens", capsys)
    run(f"contrast_scenes.py:loss=sigmoid,{given}", tmp_path / "captions")
    assert "arrays loaded as they are" in "".join(capsys.readouterr())


def check_transfer(config, scene, workdir, capsys):
    capsys.readouterr()
    run(config, workdir)
    assert "arrays loaded as they are" in "".join(capsys.readouterr())
    predict_and_draw(workdir, scene, workdir / "drawn.png")


def predict_and_draw(workdir, scene, drawn):
    assert main(["predict", f"--workdir={workdir}", f"--out={drawn}", scene]) == 0
    assert min(Image.open(drawn).size) >= 32
