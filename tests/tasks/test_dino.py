"""DINO equals its published code over six steps of multi-crop training."""

import jax
import numpy as np
import pytest
import self_supervised_golden as golden
import self_supervised_steps as steps
from scipy.special import rel_entr
from self_supervised_tiny import HEAD, MODEL, info

from vit_jax import tasks
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.types import ArraySpec, DataInfo

CASE = "dino_trajectory"
LAST = r"dino_head/prototypes/.*"


def built(about, **fields):
    model = {
        "name": "vit",
        "width": about["dim"],
        "depth": about["depth"],
        "num_heads": about["heads"],
        "patch_size": about["patch"],
        "activation": "gelu",
        "position_resize_offset": 0.1,
        "unroll": 1,
    }
    sides = {"global": (2, about["g"]), "local": (about["nlocal"], about["l"])}
    spec = {
        name: ArraySpec((crops, side, side, 3), np.dtype(np.float32))
        for name, (crops, side) in sides.items()
    }
    keys = {
        "name": "dino",
        "num_prototypes": about["out"],
        "head_depth": about["nlayers"],
        "head_hidden": about["hidden"],
        "head_bottleneck": about["bneck"],
        "temperature": [about["wtt"], about["tt"]],
        "temperature_warmup": f"{about['wte']} epochs",
        "momentum": [about["mom"], 1.0],
    }
    return tasks.build({**keys, **fields}, model, DataInfo(spec, 0))


def optimizer(about):
    return {
        "name": "adamw",
        "lr": about["lr"],
        "weight_decay": about["wd"],
        "decay_mask": r".*/kernel|.*/(?:cls|pos_embed)|dino_head/prototypes/scale",
        "decay_schedule": {"name": "dino", "end": about["wd_end"] / about["wd"]},
        "schedule": {
            "name": "dino",
            "warmup": about["warm"] * about["niter"],
            "end": about["min_lr"] / about["lr"],
        },
        "freeze_until": [[LAST, about["freeze"] * about["niter"]]],
        "clip_norm": about["clip"],
        "clip_scope": "parameter",
    }


def params_of(flat, num_heads):
    return {
        "backbone": golden.vit(golden.below(flat, "backbone."), num_heads),
        "dino_head": golden.prototype_head(golden.below(flat, "head.")),
    }


def crops(found, i):
    return {
        name: np.swapaxes(golden.images(found[f"{name}_crops"][i]), 0, 1)
        for name in ("global", "local")
    }


def test_six_steps_of_multi_crop():
    about, found = golden.settings(CASE), golden.arrays(CASE)
    total = about["epochs"] * about["niter"]
    task = built(about).with_duration(Duration(total, about["B"], about["B"] * about["niter"]))
    start, teacher = (
        params_of(golden.below(found, f"{name}_init/"), about["heads"])
        for name in ("student", "teacher")
    )
    step = steps.Steps(steps.given(task), start, optimizer(about), total, teacher)
    for i in range(about["steps"]):
        metrics = step(crops(found, i % about["niter"]))
        golden.assert_near(metrics["loss"], found["losses"][i], name=f"loss {i}")
        golden.assert_near(metrics["lr"], found["sched/lr"][i])
        golden.assert_near(task.momentum_at(i), found["sched/momentum"][i])
        center = step.state.task_state["center"]
        golden.assert_near(center, found["center_after"][i], golden.TRAINED)
    golden.assert_params(step.state.params, golden.below(found, "student_final/"))
    teacher = step.state.task_state["teacher"]
    golden.assert_params(teacher, golden.below(found, "teacher_final/"))
    counts = step.state.opt_state
    assert int(counts["adamw_late0"].count) == found["adam_step_count_last_layer"]
    assert int(counts["adamw"].count) == found["adam_step_count_backbone"]


def test_the_temperature_rises_from_epoch_to_epoch():
    """Also where the images do not fill the last batch of an epoch."""
    task = built(golden.settings(CASE), temperature=[0.04, 0.07], temperature_warmup="30 epochs")
    task = task.with_duration(Duration(100_000, 1024, 1_281_167))
    found = [float(task.temperature_at(1251 * epoch + 7)) for epoch in (0, 10, 29, 50)]
    assert found == pytest.approx([0.04, 0.04 + 0.03 * 10 / 29, 0.07, 0.07], rel=1e-6)


@pytest.mark.parametrize(("warmup", "first"), [(300, 0.04), (0, 0.07)])
def test_a_short_temperature_warmup_lasts_for_the_first_epoch(warmup, first):
    task = built(golden.settings(CASE), temperature=[0.04, 0.07], temperature_warmup=warmup)
    task = task.with_duration(Duration(100_000, 1024, 1_281_167))
    found = [float(task.temperature_at(step)) for step in (0, 1250, 1252)]
    assert found == pytest.approx([first, first, 0.07], rel=1e-6)


def test_a_collapse_is_told_by_name_after_the_first_steps():
    task = built(golden.settings(CASE), num_prototypes=1024).with_duration(Duration(1000, 4, 8))
    key = jax.random.key(0)
    different = jax.nn.softmax(10 * jax.random.normal(key, (64, 2, 1024)))
    one = jax.nn.one_hot(jax.numpy.zeros((64, 2), int), 1024)
    alike = jax.numpy.full((64, 2, 1024), 1 / 1024)
    said = {}
    for name, p in {"none": different, "one": one, "alike": alike}.items():
        metrics = {k: float(x) for k, x in task.step_metrics({}, {"class_targets": p}).items()}
        divergences = rel_entr(p, p.mean((0, 1))).sum(-1)
        assert metrics["mutual_information"] == pytest.approx(divergences.mean(), abs=1e-4)
        assert task.warnings(metrics, 10) == []
        said[name] = task.warnings(metrics, 500)
    assert said["none"] == []
    assert "collapse: the teacher chooses the same few prototypes" in said["one"][0]
    assert "collapse: the teacher chooses all prototypes about equally" in said["alike"][0]


def around(**model):
    """The task for global crops of 8 pixels and local ones of 4."""
    return tasks.build({"name": "dino", **HEAD}, {**MODEL, **model}, info(local=4))


@pytest.mark.parametrize(
    "model",
    [
        {"name": "conv_stem", "stem_strides": [2], "stem_width": 4, "patch_size": 1},
        {"position": "rope", "position_table": True},
        {"position": "rope", "position_bias": "mlp"},
    ],
)
def test_positions_of_global_crops_serve_local_ones(model):
    task = around(**model)
    assert task.model.backbone.position_grid == (None if "position_bias" in model else (4, 4))
    crops = jax.ShapeDtypeStruct((1, 2, 4, 4, 3), np.float32)
    found = jax.eval_shape(task.encode, tasks.abstract_params(task), crops)
    assert found.tokens.shape == (1, 2, 4, 16)


@pytest.mark.parametrize("model", [{"position_bias": "table"}, {"block_positions": True}])
def test_tables_in_blocks_fit_crops_of_one_grid(model):
    with pytest.raises(UserError, match=r"have grids of 2×2 and 4×4 patches; write block_pos"):
        around(**model)
    tasks.build({"name": "dino", **HEAD}, {**MODEL, **model}, info(local=8))


def test_what_belongs_to_other_methods_is_refused():
    about = golden.settings(CASE)
    with pytest.raises(UserError, match="ibot_weight is no field of task 'dino'"):
        built(about, ibot_weight=1.0)
    task = built(about)
    task.check_accumulation()
    names = jax.tree_util.tree_leaves_with_path(tasks.abstract_params(task))
    assert not any("mask_token" in jax.tree_util.keystr(path) for path, _ in names)
