"""`convert`: any format to any other, with nothing but the file where it tells the model."""

import flax.linen as nn
import flax.struct
import golden_cases
import jax
import numpy as np
import pytest
import safetensors.numpy
from golden_cases import load_case
from models_to_save import build

from vit_jax import checkpoints, models
from vit_jax.checkpoints import array_files, files
from vit_jax.checkpoints.fit.inference import infer_config
from vit_jax.checkpoints.loading import read_weights
from vit_jax.checkpoints.store import Store
from vit_jax.errors import UserError
from vit_jax.inference import convert
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec, DataInfo

PUBLISHED = [
    case
    for prefix in ("vit_", "hybrid_", "mixer_")
    for case in golden_cases.cases("vision_transformer", prefix)
]
BIG_VISION = [
    case
    for case in golden_cases.cases("big_vision", "vit_")
    if load_case("big_vision", case)[0]["model"].get("posemb", "learn") == "learn"
]


def test_relative_paths(tmp_path, monkeypatch):
    """Our own checkpoints too, which Orbax reads by absolute paths alone."""
    monkeypatch.chdir(tmp_path)
    model, params, _ = build("mean")
    checkpoints.save(params, model, "own", "orbax")
    convert.run("own", "c.npz", "npz")
    convert.run("own/0", "again.npz", "npz")
    same("c.npz", "again.npz")


def same(path, other):
    actual, expected = array_files.read_arrays(path), array_files.read_arrays(other)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name].reshape(array.shape), array, err_msg=name)


# Fields of these are those of other files, or fewer.
PLAIN = ("vit_unpooled_p8", "vit_unpooled_rep_p4", "vit_token_nohead_p8", "vit_token_cropped_p8",
         "mixer_nohead_p4", "mixer_p8")  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.soak) if case in PLAIN else case for case in PUBLISHED],
)
def test_published_files_come_back_bit_for_bit(tmp_path, case):
    """npz to ours to npz, without a word about the model."""
    config, path, _ = load_case("vision_transformer", case)
    convert.run(str(path), str(tmp_path / "own"), "orbax")
    convert.run(str(tmp_path / "own"), str(tmp_path / "c.npz"), "npz")
    if config["naming"] == "published":
        same(tmp_path / "c.npz", path)
    else:
        assert len(array_files.read_arrays(tmp_path / "c.npz")) == len(
            array_files.read_arrays(path)
        )


@pytest.mark.parametrize("case", BIG_VISION)
def test_big_vision_files_come_back_bit_for_bit(tmp_path, case):
    _, path, _ = load_case("big_vision", case)
    convert.run(str(path), str(tmp_path / "c.npz"), "big_vision")
    convert.run(str(tmp_path / "c.npz"), str(tmp_path / "again.npz"), "big_vision")
    same(tmp_path / "again.npz", tmp_path / "c.npz")
    model = golden_cases.big_vision_model(
        load_case("big_vision", case)[0]["model"], load_case("big_vision", case)[0]["num_classes"]
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        checkpoints.load(tmp_path / "c.npz", model),
        checkpoints.load(path, model),
    )


@pytest.mark.parametrize("name", ["token", "mean", "map", "every_option", "rmsnorm", "mixer"])
def test_files_for_timm_tell_their_model(tmp_path, name):
    model, params, images = build(name)
    source, copy = (str(tmp_path / f"{n}.safetensors") for n in ("source", "copy"))
    checkpoints.save(params, model, source, "timm", image_size=images.shape[1:3])
    text = convert.run(source, copy, "timm")
    assert "timm.create_model" in text or "MlpMixer" in text
    same(copy, source)
    if name != "mixer":  # As timm itself writes it.
        files.write_safetensors(source, safetensors.numpy.load_file(source))
        with pytest.raises(UserError, match=r"num_heads cannot be told.*--model.num_heads"):
            convert.run(source, copy, "timm")


def test_a_name_tells_what_the_file_does_not(tmp_path):
    config, path, _ = load_case("big_vision", "vit_mu16_variant")
    convert.run(str(path), str(tmp_path / "c.safetensors"), "timm")
    state = str(tmp_path / "c.safetensors")
    convert.run(state, str(tmp_path / "c.npz"), "big_vision", model="vit_mu16")
    model = golden_cases.big_vision_model(config["model"], config["num_classes"])
    jax.tree.map(
        np.testing.assert_array_equal,
        checkpoints.load(tmp_path / "c.npz", model),
        checkpoints.load(path, model),
    )


def test_a_stem_whose_convolutions_may_overlap_does_not_tell_its_strides(tmp_path):
    sizes = {"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8, "patch_size": 2}
    stem = {"stem_strides": (1,), "stem_kernel": 3, "stem_width": 4, "stem_norm": False}
    model = models.build("conv_stem", num_classes=None, **sizes, **stem)
    made = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    params = nn.meta.unbox(made["params"])
    checkpoints.save(params, model, tmp_path / "c", "orbax")
    weights, told = read_weights(tmp_path / "c"), {"num_heads": 2, "position": "learned"}
    with pytest.raises(UserError, match="stem_strides and stem_kernel cannot be told"):
        infer_config(weights, **told)
    found = infer_config(weights, **told, stem_strides=(1,), stem_kernel=3)
    assert {key: found[key] for key in stem} == stem


def test_nothing_is_made_up(tmp_path):
    model, params, _ = build("mean")
    source = str(tmp_path / "c.npz")
    checkpoints.save(params, model, source, "npz")
    with pytest.raises(UserError, match="is not of this model: backbone/cls"):
        convert.run(source, str(tmp_path / "out"), "orbax", fields={"pooling": "token"})
    model, params, _ = build("token")
    checkpoints.save(params, model, source, "npz")
    with pytest.raises(UserError, match="holds more than this model: backbone/cls"):
        convert.run(source, str(tmp_path / "out"), "orbax", fields={"pooling": "mean"})
    assert not (tmp_path / "out").exists()


def test_positions_without_parameters_have_to_be_named(tmp_path):
    model, params, _ = build("sincos")
    source = str(tmp_path / "c.npz")
    checkpoints.save(params, model, source, "big_vision")
    with pytest.raises(UserError, match=r"--model\.position="):
        convert.run(source, str(tmp_path / "d.npz"), "npz", image_size=12)
    fields = {"position": "sincos2d"}
    convert.run(source, str(tmp_path / "d.npz"), "npz", fields=fields, image_size=12)
    assert (tmp_path / "d.npz").exists()


def test_resizing_on_the_way(tmp_path):
    model, params, _ = build("token")
    source = str(tmp_path / "c.npz")
    checkpoints.save(params, model, source, "npz")
    text = convert.run(source, str(tmp_path / "d.npz"), "npz", image_size=(8, 20))
    assert "3x3 to 2x5" in text
    assert "img_size=(8, 20)" in text


@flax.struct.dataclass
class State:
    """As much of a training state as matters here."""

    params: dict
    ema: dict | None


@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_of_ours_tells_its_model(tmp_path, tiny_config, averaged):
    model, params, _ = build("mean")
    fields = {"pooling": "mean", "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2}
    config = tiny_config()
    with config.unlocked():
        config.model = {"name": "vit", "mlp_dim": 24, **fields}
    workdir = Workdir.open(str(tmp_path / "run"))
    image = ArraySpec((12, 12, 3), np.dtype(np.uint8))
    workdir.write_config(
        config, DataInfo(spec={"image": image}, num_classes=3, class_names=()), "accuracy", {}
    )
    store = Store(workdir.checkpoints)
    average = jax.tree.map(lambda x: x + 1, params) if averaged else None
    for step in (3, 12):
        saved = params if step == 12 else jax.tree.map(np.zeros_like, params)
        store.save(step, State(saved, average), {})
    store.wait()
    store.close()
    places = ["run", "run/checkpoints", "run/checkpoints/12"]
    for number, place in enumerate(places):
        target = str(tmp_path / f"{number}.npz")
        text = convert.run(str(tmp_path / place), target, "npz")
        assert "vit_jax checkpoint of step 12" in text
        assert ("moving average" in text) == averaged
        back = checkpoints.load(target, model)
        jax.tree.map(np.testing.assert_array_equal, back, average if averaged else params)
