"""Fine-tuning from the files of other libraries through `configs/finetune.py`."""

import re
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import checkpoints, optim, tasks
from vit_jax.__main__ import main
from vit_jax.checkpoints import loading
from vit_jax.checkpoints.store import Store
from vit_jax.config import load
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.models import lora
from vit_jax.recipes import own_images
from vit_jax.training import initial_state
from vit_jax.training.run import Run
from vit_jax.types import ArraySpec, DataInfo

SIDE = 24
# The files are of images of 16 pixels; what is resized for larger ones.
FILES = {
    "hf_tiny/dinov2": {"pos_embed"},
    "hf_tiny/dinov3": set(),
    "hf_tiny/clip_vision": {"pos_embed"},
    "hf_tiny/siglip2": {"pos_embed"},
    "timm_tiny/eva02_base_patch14_224": {"pos_embed"},
    "hf_tiny/beit": {"position_bias/table"},
    "hf_tiny/mae": {"pos_embed"},
}
AFTER_BLOCKS = r"backbone/(norm|fc_norm|map_head)/.*|head/.*"


def config_of(root, file, **more):
    written = "".join(f",{key}={value}" for key, value in more.items())
    return f"{root}/configs/finetune.py:model={root}/tests/golden/{file}{written}"


# One file of each kind of table or norm is in the default suite.
DEFAULT = ("hf_tiny/clip_vision", "hf_tiny/beit", "timm_tiny/eva02_base_patch14_224")


@pytest.mark.parametrize(
    "file", [f if f in DEFAULT else pytest.param(f, marks=pytest.mark.soak) for f in FILES]
)
def test_a_released_file_fits_a_run_at_another_size(file, request):
    config = load(config_of(request.config.rootpath, file))
    image = ArraySpec((SIDE, SIDE, 3), np.dtype(np.uint8))
    info = DataInfo({"image": image, "label": ArraySpec((), np.dtype(np.int32))}, 5)
    task = tasks.build(config.task, config.model, info)
    params, report = loading.load_with_report(
        config.init.checkpoint, task.model, image_size=SIDE, head=config.init.head
    )
    resized = {name for name in ("pos_embed", "position_bias/table") if name in str(report.resized)}
    assert resized == FILES[file]
    assert all(line.startswith("head/") for line in report.initialised)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    # Every parameter belongs to the blocks, or to what comes before or after them.
    outside = {n for n in flat if not re.fullmatch(config.optim.blocks, n)}
    before = {n for n in outside if re.fullmatch(config.optim.stem, n)}
    assert outside - before == {n for n in outside if re.fullmatch(AFTER_BLOCKS, n)}
    kernels = [n for n in flat if re.fullmatch(lora.ATTENTION_AND_MLP, n)]
    assert {n.split("/")[-2] for n in kernels} >= {"query", "key", "value", "out", "dense1"}
    check_what_adapters_leave(config, params, kernels)


def check_what_adapters_leave(config, params, kernels):
    """Three updates with gradients everywhere change the adapters and the head alone."""
    factors = {
        f"lora/{n}/{part}": np.ones(3, np.float32) for n in kernels for part in ("down", "up")
    }
    params = {**params, **flax.traverse_util.unflatten_dict(factors, sep="/")}
    frozen = {"freeze": lora.frozen(params), "layer_decay": 0.75}
    duration = Duration(total=2000, batch_size=1, num_examples=10)
    optimizer = optim.build({**config.optim, **frozen}, params, duration=duration)
    after, state = params, optimizer.init(params)
    for step in range(1, 4):
        grads = jax.tree.map(np.ones_like, after)
        updates, state = optimizer.update(grads, state, after, step)
        after = jax.tree.map(lambda x, y: x + y, after, updates)
    before, after = (flax.traverse_util.flatten_dict(one, sep="/") for one in (params, after))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("lora/", "head/"))}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with images of two classes."""
    place, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0).integers
    for number in range(24):
        name = place / ("cat", "dog")[number % 2]
        name.mkdir(exist_ok=True)
        Image.fromarray(draw(0, 256, (40, 40, 3), np.uint8)).save(name / f"{number}.jpg")
    return place


@pytest.mark.soak
@pytest.mark.parametrize("file", FILES)
def test_a_run_from_a_released_file_resumes_exactly(file, photos, tmp_path, request):
    splits = {"split": "train[:75%]", "test": "train[75%:]"}
    config = config_of(request.config.rootpath, file, dataset=photos, runlocal="", **splits)
    command = ["train", f"--config={config.replace('runlocal=', 'runlocal')}"]
    command += ["--config.optim.layer_decay=0.75", "--config.log.pictures=false"]
    command += ["--config.checkpoint.every=2", f"--workdir={tmp_path}"]
    assert main(command) == 0
    steps = tmp_path / "checkpoints"
    first = checkpoints.loading.read_weights(steps / "4").arrays
    shutil.rmtree(steps / "4")
    assert main(command) == 0
    second = checkpoints.loading.read_weights(steps / "4").arrays
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.soak
@pytest.mark.parametrize("file", FILES)
def test_a_run_trains_adapters_on_a_released_file(file, photos, tmp_path, request):
    splits = {"split": "train[:75%]", "test": "train[75%:]", "lora": 2}
    config = config_of(request.config.rootpath, file, dataset=photos, runlocal="", **splits)
    config = config.replace("runlocal=", "runlocal")
    assert main(["train", f"--config={config}", f"--workdir={tmp_path}"]) == 0
    run = Run.build(load(config))
    before, _ = initial_state.first_state(run)
    after = Store(tmp_path / "checkpoints").restore_newest(run.abstract).tree
    before, after = (
        flax.traverse_util.flatten_dict(jax.device_get(one.params), sep="/")
        for one in (before, after)
    )
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    trained = {name for name in before if name.startswith(("lora/", "head/"))}
    # The factors `down` have no gradient until the head and the factors `up` have left zero.
    assert trained >= changed >= {name for name in trained if not name.endswith("/down")}


def test_a_checkpoint_with_a_name_that_no_file_can_have_is_one_line():
    with pytest.raises(UserError, match="there is no such file or folder"):
        own_images.model_of("x" * 300)
