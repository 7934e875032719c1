"""Every recipe: it loads, has the published size, takes two steps when shrunk; the data is fake."""

import json
import re

import jax
import numpy as np
import pytest

from vit_jax import data
from vit_jax.checkpoints import input_spec
from vit_jax.config import load, validate
from vit_jax.errors import UserError
from vit_jax.parallel import sharding
from vit_jax.recipes import own_images
from vit_jax.training import step
from vit_jax.training.run import Run
from vit_jax.training.stages import stages_of

# Parameters at 1,000 classes, as published: by big_vision's and vision_transformer's own counts
# where there is one, else that count with what the recipe adds or leaves out.
B, S, L = 86_566_120, 22_049_896, 304_324_584  # Mean pooling, learned positions at 224 px.
RECIPES = {
    "vit_s16_i1k": 22_122_472,
    "vit_s16_i1k:300": 22_122_472,
    "vit_i1k": B + 768 + 768 * 769,  # Class token; pre-logits.
    "vit_i1k:vit_s32,aug=light1": 22_878_184 + 384 + 384 * 385,
    "vit_i21k": B + 20_843 * 769,
    "vit_i21k:vit_l16": L + 20_843 * 1025,
    "augreg": 86_567_656 + (24**2 - 14**2) * 768,
    "augreg:r26_s32,size=224": 36_431_912,
    "deit3": S + 384 + 24 * 384,  # Class token, LayerScale.
    "deit3:b16": B + 768 + 24 * 768 - (14**2 - 12**2) * 768,
    "deit3:l16,checkpoint=x": L + 1024 + 48 * 1024,
    "mixer_b16_i1k": 59_880_472,
    "bit_r50_i1k": 25_557_032,  # torchvision's ResNet-50.
    "bit_r50_i1k:bit_r50x1": 25_549_352,
    "r26_s32": 36_431_912,
    # No table of positions, registers, LayerScale, norms without bias, query and key norms,
    # rotary frequencies.
    "strong_i1k": S - 196 * 384 + 4 * 384 + 24 * 384 - 25 * 384 + 24 * 64 + 12 * 384,
    "algoperf_vit": 22_122_472,
    "mae_b16_i1k": 111_907_840,  # With its decoder of 26 million.
    "mae_b16_i1k:checkpoint=x": B + 768 + 768,  # Class token and its position.
}
# A model that another recipe or another test has too; tracing it takes seconds.
SIZED_ELSEWHERE = ("augreg:r26_s32,size=224", "bit_r50_i1k:bit_r50x1")
# Each program once: others differ from these in settings alone.
RUN = ("deit3", "mixer_b16_i1k", "strong_i1k:b16")
RUN_LONG = ("vit_s16_i1k", "vit_i21k:vit_G14", "bit_r50_i1k", "r26_s32", "algoperf_vit")
SIZE = re.compile(r"(?:crop|resize)\((\d+)")


def path(root, recipe, *arguments):
    name, _, given = recipe.partition(":")
    given = ",".join(filter(None, (given, *arguments)))
    return f"{root}/configs/{name}.py:{given}"


def with_made_up_images(config, classes=1000):
    """The config over decoded random images of the size it crops to."""
    size = int(SIZE.search(config.data.pp)[1])
    changed = config.to_dict()
    changed["data"] |= {"source": "fake", "name": "x", "split": "train", "pp": "", "eval_pp": ""}
    changed["data"]["args"] = {"num_examples": 64, "num_classes": classes, "image_size": size}
    changed["init"]["checkpoint"] = ""
    changed["eval"]["sets"] = {}
    return validate(type(config)(changed))


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=pytest.mark.soak) if recipe in SIZED_ELSEWHERE else recipe
        for recipe in RECIPES
    ],
)
def test_full_size_is_the_published_one(recipe, root):
    config = load(path(root, recipe))
    assert json.loads(json.dumps(config.to_dict())) is not None
    classes = 21_843 if "i21k" in recipe else 1000
    config = with_made_up_images(config, classes)
    shortened = config.to_dict()
    shortened["total"] = 200_000
    shortened["optim"]["schedule"]["warmup"] = "5 percent"
    run = Run.build(validate(type(config)(shortened)))
    assert run.num_params() == RECIPES[recipe]
    train_step = step.make_train_step(run.task, run.optimizer, run.abstract, run.mesh)
    batch = sharding.abstract_batch(run.task.info.spec, run.mesh, config.batch_size)
    with sharding.activate(run.mesh):
        state, metrics = train_step.eval_shape(run.abstract, batch)
    assert jax.tree.structure(state) == jax.tree.structure(run.abstract)
    assert metrics["loss"].shape == ()


def made_up(abstract):
    """A state without compiling its initialisation: small random parameters, everything else 0."""
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: draw(0, 0.02, x.shape), abstract.params)
    state = jax.tree.map(lambda x: np.zeros(x.shape), abstract).replace(params=params)
    return jax.tree.map(
        lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), state, abstract
    )


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "recipe", [*RUN, *(pytest.param(recipe, marks=pytest.mark.soak) for recipe in RUN_LONG)]
)
def test_shrunk_it_takes_two_steps(recipe, root, monkeypatch):
    # Compiling the sampler of Beta variables takes a second a recipe; others test it.
    monkeypatch.setattr(
        jax.random, "beta", lambda key, a, b, shape=(): jax.random.uniform(key, shape)
    )
    config = with_made_up_images(load(path(root, recipe, "runlocal")), classes=10)
    run = Run.build(config)
    state = made_up(run.abstract)
    before = jax.device_get(state.params)
    train_step = run.compile_step()
    with run.open_feed(0) as feed:
        for _ in range(run.duration.total):
            state, metrics = train_step(state, feed.next_batch())
            assert np.isfinite(metrics["loss"])
    assert state.step == 2
    assert metrics["bad_steps"] == 0
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.params))
    assert changed["head"]["bias"]


def test_a_wrong_key_or_argument_is_refused(root):
    with pytest.raises(UserError, match=r"optim\.lrr is unknown"):
        load(path(root, "vit_s16_i1k"), {"optim.lrr": "1"})
    for recipe, message in {
        "vit_s16_i1k:epoch=3": "did you mean 'epochs'",
        "vit_s16_i1k:others=reel": "did you mean 'real'",
        "vit_i1k:vit_b17": "did you mean 'vit_b16'",
        "vit_i1k:aug=medium3": "did you mean 'medium",
        "vit_i21k:vit_G15": "did you mean 'vit_G14'",
        "deit3:b17": "did you mean 'b16'",
        "strong_i1k:b17": "did you mean 'b16'",
        "digits_rehearsal:vitt": "did you mean 'vit'",
        "digits_rehearsal:vit,data=hgih": "did you mean 'high'",
    }.items():
        with pytest.raises(UserError, match=message):
            load(path(root, recipe))


def test_big_visions_decay_is_not_multiplied_by_the_learning_rate(root):
    """1e-4 beside a learning rate of 1e-3 is what `decay_coupling="lr"` calls 0.1."""
    for recipe in ("vit_s16_i1k", "vit_i1k", "vit_i21k", "mixer_b16_i1k", "r26_s32"):
        optim = load(path(root, recipe)).optim
        assert (optim.decay_coupling, optim.weight_decay, optim.lr) == ("schedule", 1e-4, 1e-3)
    optim = load(path(root, "bit_r50_i1k")).optim
    assert (optim.decay_coupling, optim.weight_decay, optim.lr) == ("schedule", 1.6e-3, 1.6)


def staged(root, recipe):
    """The stages of a recipe shrunk to seconds: names, last steps, sides of the images."""
    config = load(path(root, recipe, "runlocal"))
    stages = stages_of(Run.build(config, source=data.expect(config.data)))
    specs = [stage.run.task.info.spec for stage in stages]
    images = [spec.get("image", spec.get("global")) for spec in specs]
    return [(s.name, s.end, x.shape[-2]) for s, x in zip(stages, images, strict=True)]


@pytest.mark.usefixtures("one_device")
def test_recipes_with_stages_have_one_state(root):
    assert staged(root, "speedrun_i1k") == [
        ("quarter1", 1, 16), ("quarter2", 2, 16), ("quarter3", 3, 32), ("", 4, 32),
    ]  # fmt: skip
    config = load(path(root, "speedrun_i1k"))
    assert [stage.data.pp for stage in config.stages.values()] == [
        f"decode_jpeg_and_inception_crop({size})|flip_lr|randaug(2,{magnitude})"
        for size, magnitude in ((128, 4), (160, 6), (192, 8))
    ]
    flagship = load(path(root, "vit_s16_i1k"))
    alike = load(path(root, "speedrun_i1k", "curriculum=False", "grow=False"))
    assert alike.to_dict() == flagship.to_dict()
    assert staged(root, "dinov2_l14_i1k:high") == [("low", 2, 32), ("", 4, 48)]
    high = load(path(root, "dinov2_l14_i1k", "high"))
    assert (high.stages.low.until, high.total) == (125_000, 135_000)
    assert high.stages.low.data.pp == load(path(root, "dinov2_l14_i1k")).data.pp
    assert high.data.pp == high.stages.low.data.pp.replace("crop(224,", "crop(518,")


def test_deit3_is_fine_tuned_at_one_rate_and_s_without_stochastic_depth(root):
    found = {}
    for size in ("s16", "b16", "l16"):
        for arguments in ((), ("checkpoint=x",), ("checkpoint=x", "size=384")):
            config = load(path(root, f"deit3:{size}", *arguments))
            found.setdefault(size, []).append(config.model.drop_path)
    assert found == {"s16": [0.05, 0.0, 0.0], "b16": [0.2, 0.2, 0.15], "l16": [0.45, 0.45, 0.4]}
    assert (config.optim.schedule.name, config.optim.lr) == ("constant", 1e-5)


def test_segmenter_trains_all_layers_at_one_rate_that_ends_at_theirs(root):
    optim = load(path(root, "segment_ade20k")).optim
    assert (optim.layer_decay, optim.weight_decay, optim.lr) == (1.0, 0.0, 1e-3)
    assert optim.lr * optim.schedule.end == pytest.approx(1e-5)
    optim = load(path(root, "segment_ade20k", "data=cityscapes", "folder=x")).optim
    assert (optim.lr, optim.lr * optim.schedule.end) == (1e-2, pytest.approx(1e-5))


def test_the_decay_of_lit_is_not_multiplied_by_the_learning_rate(root):
    optim = load(path(root, "lit_coco")).optim
    assert (optim.decay_coupling, optim.weight_decay, optim.lr) == ("schedule", 1e-2, 1e-3)


def test_data_of_the_recipes(root):
    config = load(path(root, "vit_s16_i1k", "others=real+a"))
    assert config.data.pp == "decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2,10)"
    eval_pp = "decode|resize_small(256)|central_crop(224)"
    assert config.data.eval_pp == eval_pp
    assert config.eval.sets.minival.split == "train[99%:]"
    assert config.eval.sets.real.pp == eval_pp + '|copy("real_label","label")'
    assert config.eval.sets.a.name == "imagenet_a"
    folder = load(path(root, "deit3", "data=/somewhere/imagenet"))
    assert (folder.data.source, folder.data.split) == ("folder", "train")
    assert folder.data.repeats == 3
    flagship = load(path(root, "vit_s16_i1k", "data=/somewhere/imagenet", "others=a"))
    for one in (folder, flagship, load(path(root, "vit_i21k", "data=/somewhere/imagenet21k"))):
        assert one.data.args.to_dict() == {"exif": "ignore"}
    assert flagship.eval.sets.a.args.to_dict() == {}  # They are those of TFDS.


@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
def test_a_folder_of_ones_own_is_validated_on_its_validation_split(
    root, tmp_path, monkeypatch, folder
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", folder):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
    for given in (str(tmp_path / "photos"), "~/photos"):
        config = load(path(root, "folder", given))
        assert config.data.split == "train"
        assert config.eval.sets.val.split == "validation"


def test_a_table_of_ones_own_is_divided_if_it_has_no_splits(root, tmp_path):
    for name in ("all.csv", "train.csv", "test.csv"):
        (tmp_path / name).write_text("path,label\n" + "a.png,cat\n" * 40)
    config = load(path(root, "folder", str(tmp_path / "all.csv")))
    assert (config.data.source, config.data.split) == ("table", "train[all but fold 1 of 10]")
    assert config.eval.sets.val.split == "train[fold 1 of 10]"
    config = load(path(root, "folder", str(tmp_path / "{split}.csv")))
    assert (config.data.split, config.eval.sets.val.split) == ("train", "test")


def test_the_columns_of_a_table_are_told_before_its_images_are_counted(root, tmp_path, capsys):
    table = tmp_path / "all.csv"
    rows = "".join(f"{i}.png,{('cat', 'dog')[i % 2]},p{i // 4},a\n" for i in range(3000))
    table.write_text("photo,species,who,part\n" + rows)
    config = load(path(root, "folder", str(table), "image=photo", "label=species", "group=who"))
    assert config.data.args.to_dict() == {"image": "photo", "label": "species", "group": "who"}
    assert (config.batch_size, config.total) == (64, "50 epochs")
    said = capsys.readouterr().err
    assert said.startswith("2,700 training images (train[all but fold 1 of 10], evaluated on")
    assert f"augmentation {config.data.pp} and mixup 0.2;" in said
    load(path(root, "folder", str(table)))
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("the training images cannot be counted, so nothing is chosen by their")
    assert "has photo, species, who, part; name the column of the label" in said
    assert said.endswith("it is written image=COLUMN,label=COLUMN")
    columns = ("image=photo", "label=species", "split_column=part")
    table.write_text("photo,species,part\n" + "a.png,x,train\n" * 30 + "b.png,x,Val\n")
    config = load(path(root, "folder", str(table), *columns))
    assert (config.data.split, config.eval.sets.val.split) == ("train", "validation")
    assert capsys.readouterr().err.startswith("30 training images (train, evaluated on validation)")
    table.write_text("photo,species,part\n" + "a.png,x,train\n" * 30)
    config = load(path(root, "folder", str(table), *columns))
    assert config.eval.sets.val.split == "train[fold 1 of 10]"


def test_another_share_than_a_tenth_may_be_held_out(tmp_path):
    def splits(root, **args):
        return own_images.data_of(str(root), **args)[1:]

    folder, table = tmp_path / "photos", tmp_path / "all.csv"
    (folder / "cat").mkdir(parents=True)
    table.write_text("path,label,part\na.png,cat,train\nb.png,cat,val\n")
    assert splits(folder) == ("train[:90%]", "train[90%:]")
    assert splits(folder, val=0.15) == ("train[:85%]", "train[85%:]")
    folds = ("train[all but fold 1 of 5]", "train[fold 1 of 5]")
    assert splits(table, val=0.2) == splits(folder, group=r"p\d+", val=0.2) == folds
    assert splits(table, val=0.33)[1] == "train[fold 1 of 3]"
    for root, args, message in (
        (folder, {"val": 0.125}, r"val=0\.125: write a share of the images in whole percent"),
        (folder, {"val": 1.0}, r"val=1: write a share"),
        (table, {"val": 0.15}, r"val=0\.15: one of several .* such as val=0\.143 for one of 7"),
        (table, {"val": -1.0}, r"such as val=0\.5 for one of 2"),
        (table, {"val": 0.2, "split_column": "part"}, "has its own split 'validation'; leave"),
    ):
        with pytest.raises(UserError, match=message):
            splits(root, **args)


def test_a_released_model_is_fine_tuned_by_its_name(root, tmp_path, capsys):
    for number in range(40):
        file = tmp_path / "a, b" / ("cat", "dog")[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    config = load(path(root, "folder", f'"{tmp_path}/a, b"', "checkpoint=vit_s16"))
    assert config.data.name == f"{tmp_path}/a, b"
    assert config.model.name == "vit_s16"
    address = "https://storage.googleapis.com/vit_models/augreg/S_16-i21k-300ep-lr_0.001-aug_light1"
    assert config.init.checkpoint == f"{address}-wd_0.03-do_0.0-sd_0.0.npz"
    assert (config.batch_size, config.total) == (16, "30 epochs")
    said = capsys.readouterr().err
    assert said.startswith(
        "36 training images (train[:90%], evaluated on train[90%:]): vit_s16 from"
    )
    assert "224 px, batches of 16, 30 epochs, learning rate 0.00093" in said
    config = load(path(root, "folder", f'"{tmp_path}/a, b"', "epochs=3,batch=8,size=64"))
    assert (config.total, config.batch_size) == ("3 epochs", 8)
    assert "randaug(2,5," in config.data.pp
    with pytest.raises(UserError, match=r"no such file .*did you mean 'vit_s16'"):
        load(path(root, "folder", "/x", "checkpoint=vit_s61"))
    file = load(path(root, "folder", "/x", "checkpoint=runs/a,model=vit_b16"))
    assert (file.init.checkpoint, file.model.name) == ("runs/a", "vit_b16")


def test_the_folder_of_a_released_model_is_fine_tuned_with_its_images(root):
    folder = f"{root}/tests/golden/hf_tiny/dinov2"
    config = load(path(root, "folder", "/x", f"checkpoint={folder}"))
    assert (config.init.checkpoint, config.init.head) == (folder, "zero")
    assert config.model.layer_scale
    told = input_spec.read(folder)
    assert tuple(config.task.mean) == told.mean
    assert f"inception_crop({told.size[0]})" in config.data.pp


def test_the_flagship_is_the_recipe_whose_steps_are_recorded(root):
    """`tests/optim/test_trajectory.py` holds 30 steps of these settings to big_vision's."""
    recorded = json.loads(
        (root / "tests/golden/big_vision/trajectory_s16_recipe_bf16mu.json").read_text()
    )
    config, theirs = load(path(root, "vit_s16_i1k")), recorded["optimizer"]
    optim = config.optim
    assert (optim.lr, optim.weight_decay) == (theirs["lr"], theirs["wd"])
    assert (optim.clip_norm, dict(optim.args)) == (theirs["grad_clip_norm"], theirs["optax"])
    assert optim.schedule.name == theirs["schedule"]["decay_type"]
    assert (optim.name, theirs["optax_name"]) == ("adamw", "scale_by_adam")
    assert (config.model.pooling, recorded["model"]["pool_type"]) == ("mean", "gap")
    assert config.model.position == recorded["model"]["posemb"]
    assert config.task.get("loss", "softmax") == recorded["loss"].removesuffix("_xent")
    assert config.task.mixup == recorded["mixup_p"]


@pytest.mark.parametrize("model", ["vit", "bit"])
def test_the_rehearsal_is_the_flagship_at_another_size(root, model):
    flagship, rehearsal = (
        load(path(root, "vit_s16_i1k")),
        load(path(root, f"digits_rehearsal:{model}")),
    )
    for section in ("task", "precision", "accum_steps", "ema_decay"):
        assert rehearsal[section] == flagship[section]
    optim, theirs = rehearsal.optim.to_dict(), flagship.optim.to_dict()
    assert optim["schedule"].pop("warmup") == "9 percent"
    del theirs["schedule"]["warmup"]
    assert optim == theirs
    assert Run.build(with_made_up_images(rehearsal, 10)).num_params() == SMALL[model]


SMALL = {"vit": 125_290, "bit": 121_130}


def test_every_recipe_is_on_the_page_and_says_what_to_expect(root):
    page = (root / "docs/recipes.md").read_text()
    names = {recipe.partition(":")[0] for recipe in RECIPES}
    for name in names | {path.stem for path in (root / "configs").glob("*_i1k.csv")}:
        assert f"`{name}.py" in page
        text = (root / f"configs/{name}.py").read_text().partition('"""\n\nfrom')[0]
        assert f"--config=configs/{name}.py" in text
        assert re.search(r"[Ww]e have (?:not )?run", text.replace("\n", " "))
