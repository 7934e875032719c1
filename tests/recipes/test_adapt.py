"""`configs/adapt.py`: a released model is trained on with images of one's own, without labels."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.config import load
from vit_jax.data import open_source
from vit_jax.errors import UserError
from vit_jax.optim.groups import named_leaves
from vit_jax.tracking import read_metrics
from vit_jax.training.loop import train
from vit_jax.training.run import Run


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


@pytest.fixture(scope="module")
def released(root):
    return f"{root}/tests/golden/hf_tiny/dinov2"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of photographs, told apart by their brightness."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 128)):
        (folder / name).mkdir()
        for number in range(24):
            pixels = draw.integers(low, low + 128, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def loaded(root, photos, released, *arguments, **keys):
    given = ",".join((f"{root}/configs/adapt.py:{photos}", f"checkpoint={released}", *arguments))
    fixed = {"compilation_cache": "", "log.pictures": "false", "log.tensorboard": "false"}
    return load(f"{given},size=16,batch=8", {**fixed, **keys})


HEAD = {"task.num_prototypes": "16", "task.head_hidden": "16", "task.head_bottleneck": "8"}


@pytest.mark.soak
def test_dino_goes_on_from_a_released_model_and_tells_the_classes_apart(
    root, photos, released, tmp_path, capsys
):
    short = {"total": "2", "optim.schedule.warmup": "0", "optim.freeze_until": "[]"}
    config = loaded(root, photos, released, "lora=2", **HEAD, **short)
    assert (config.data.source, config.eval.probes.split) == ("folder", config.data.split)
    config.data.pp = config.data.pp.replace("views('local', 8", "views('local', 2")
    train(config, str(tmp_path))
    last = [row for row in read_metrics(tmp_path) if "eval/val/knn_20" in row][-1]
    assert last["eval/val/knn_20"] == last["eval/val/linear"] == 1.0
    assert 0 < last["eval/val/feature_distance"] < 1
    said = capsys.readouterr().err
    assert "43 images: vit from" in said
    assert "initialised: dino_head" in said


def test_adapters_leave_the_new_head_trainable(root, photos, released, one_device):
    # Compiling the loops of the crops' colors takes longer than all the rest.
    plain = "decode|views('global', 2, 'resize(16)')|views('local', 2, 'resize(8)')"
    keys = {**HEAD, "data.pp": f"{plain}|keep('global', 'local')"}
    run = Run.build(loaded(root, photos, released, "lora=2", **keys))
    names = named_leaves(run.abstract.params)
    trained = {name for name in names if not run.optimizer.table[name].frozen}
    assert any(name.startswith("dino_head/") for name in trained)
    assert any("lora" in name for name in trained)
    assert not any(name.startswith("backbone/blocks") for name in trained)
    assert not any("lora" in name and "dino_head" in name for name in names)


def test_mae_goes_on_with_the_statistics_of_the_checkpoint(root, photos, released, one_device):
    config = loaded(root, photos, released, "method=mae")
    assert Run.build(config).task.headline == "loss"
    assert config.task.mean == pytest.approx([123.675, 116.28, 103.53])


def test_images_without_classes_are_read_at_any_depth(root, photos, released, tmp_path):
    for number, file in enumerate(sorted(photos.rglob("*.png"))):
        target = tmp_path / ("" if number % 2 else "deep/er") / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (tmp_path / "notes.txt").write_text("no image")
    config = loaded(root, tmp_path, released)
    assert (config.data.source, config.data.split) == ("image_files", "train[:95%]")
    assert not config.eval.probes
    assert config.total == "100 epochs"
    spec = {"source": "image_files", "name": str(tmp_path), "dir": "", "split": "train"}
    whole = open_source(spec)
    assert (len(whole), whole.num_classes) == (48, 0)
    parts = [open_source({**spec, "split": f"train[{part}]"}) for part in (":75%", "75%:")]
    names = [{source.describe(i) for i in range(len(source))} for source in parts]
    assert [len(part) for part in names] == [36, 12]
    assert not set.intersection(*names)
    assert parts[0].fetch(np.array([3])).keys() == {"image"}
    with pytest.raises(UserError, match="has no split 'val'"):
        open_source({**spec, "split": "val"})


def test_wrong_arguments_are_refused(root, photos):
    for given, message in {
        "checkpoint=x,method=dinov": "did you mean 'dino'",
        "method=dino": "checkpoint is missing",
    }.items():
        with pytest.raises(UserError, match=message):
            load(f"{root}/configs/adapt.py:{photos},{given}")
