"""DINOv2 equals its reference code, from the objective to student and teacher after five steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import self_supervised_golden as golden
import self_supervised_steps as steps
import self_supervised_tiny as tiny

from vit_jax import optim, tasks
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.types import ArraySpec, DataInfo

CASES = ["centering_separate_head"]
DECAYED = r".*/kernel|.*/(pos_embed|cls|registers|scale)|mask_token"
NOT_DECAYED = r".*norm.*"
STEM = r"(.*/)?(patch_embed/.*|pos_embed|cls|registers|mask_token)"


class Case:
    """One recorded objective, with the task and the parameters that it belongs to."""

    def __init__(self, name):
        self.about = about = golden.settings(f"dinov2_objective_{name}")
        self.found = golden.arrays(f"dinov2_objective_{name}")
        self.heads = about["heads"]
        self.length = about["optim"]["epochs"] * about["iters_per_epoch"]
        swiglu, hidden = about["ffn"] == "swiglufused", about["mlp"] * about["dim"]
        self.model = {
            "name": "vit",
            "width": about["dim"],
            "depth": about["depth"],
            "num_heads": self.heads,
            "mlp": "swiglu" if swiglu else "gelu",
            "mlp_dim": (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden,
            "patch_size": about["patch"],
            "activation": "gelu",
            "layer_scale": about["ls"],
            "num_registers": about["reg"],
            "position_resize_offset": about["offset"],
            "position_resize_antialias": about["aa"],
        }
        teacher, dino, ibot = about["teacher"], about["dino"], about["ibot"]
        self.fields = {
            "name": "dinov2",
            "num_prototypes": dino["head_n_prototypes"],
            "head_depth": dino["head_nlayers"],
            "head_hidden": dino["head_hidden_dim"],
            "head_bottleneck": dino["head_bottleneck_dim"],
            "teacher": about["centering"].removesuffix("_knopp"),
            "temperature": [teacher["warmup_teacher_temp"], teacher["teacher_temp"]],
            "temperature_warmup": teacher["warmup_teacher_temp_epochs"] * about["iters_per_epoch"],
            "momentum": [teacher["momentum_teacher"], teacher["final_momentum_teacher"]],
            "dino_weight": dino["loss_weight"],
            "ibot_weight": ibot["loss_weight"],
            "koleo_weight": dino["koleo_loss_weight"],
            "mask_share": ibot["mask_sample_probability"],
            "mask_ratio": ibot["mask_ratio_min_max"],
        }
        if ibot["separate_head"]:
            self.fields |= {
                "ibot_prototypes": ibot["head_n_prototypes"],
                "ibot_hidden": ibot["head_hidden_dim"],
                "ibot_bottleneck": ibot["head_bottleneck_dim"],
            }
        self.task = self.build()

    def build(self, **fields):
        sides = {"global": (2, self.about["g"]), "local": (self.about["nl"], self.about["l"])}
        spec = {
            name: ArraySpec((crops, side, side, 3), np.dtype(np.float32))
            for name, (crops, side) in sides.items()
        }
        task = tasks.build({**self.fields, **fields}, self.model, DataInfo(spec, 0))
        return task.with_duration(Duration(self.length, 4, 8))

    def params(self, when):
        return params_of(golden.below(self.found, f"{when}/"), self.heads)

    def batch(self, i):
        found = golden.below(self.found, f"batch{i}/collated_")
        crops = {
            name: by_image(golden.images(found[f"{name}_crops"])) for name in ("global", "local")
        }
        return {**crops, "masked": by_image(found["masks"])}

    def optimizer(self):
        keys, iters = self.about["optim"], self.about["iters_per_epoch"]
        base = keys["lr"]
        schedule = {
            "name": "dino",
            "warmup": keys["warmup_epochs"] * iters,
            "end": keys["min_lr"] / base,
        }
        frozen = keys["freeze_last_layer_epochs"] * iters
        return {
            "name": "adamw",
            "lr": base,
            "weight_decay": keys["weight_decay"],
            "decay_mask": rf"(?!{NOT_DECAYED})({DECAYED})",
            "schedule": schedule,
            "decay_schedule": {
                "name": "dino",
                "end": keys["weight_decay_end"] / keys["weight_decay"],
            },
            "group_schedules": [[r".*/prototypes/.*", {**schedule, "zero_until": frozen}]],
            "clip_norm": keys["clip_grad"],
            "clip_scope": "module",
            "layer_decay": keys["layerwise_decay"],
            "stem": STEM,
            "lr_mults": [[r".*patch_embed/.*", keys["patch_embed_lr_mult"]]],
        }


def by_image(crops):
    """Crops of a reference, all images of crop 1 first, as [image, crop, ...]."""
    return np.swapaxes(crops.reshape(-1, 4, *crops.shape[1:]), 0, 1)


def by_crop(rows):
    """Inverts `by_image`."""
    return np.swapaxes(rows, 0, 1).reshape(-1, *rows.shape[2:])


def params_of(flat, num_heads):
    backbone = golden.below(flat, "backbone.")
    tree = {"backbone": golden.vit(backbone, num_heads)}
    tree["mask_token"] = backbone["mask_token"][None]
    for name in ("dino_head", "ibot_head"):
        if head := golden.below(flat, f"{name}."):
            tree[name] = golden.prototype_head(head)
    return tree


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


def test_five_steps(case):
    params, teacher = case.params("student_init"), case.params("teacher_init")
    task, found = case.task, case.found
    step = steps.Steps(steps.given(task), params, case.optimizer(), case.length, teacher)
    for i in range(case.about["steps"]):
        for name in ("dino", "ibot"):
            if task.teacher == "centering":
                used = step.state.task_state[f"{name}_center"]
                golden.assert_near(used, found[f"{name}_center_applied"][i])
        metrics = step(case.batch(i % 2))
        golden.assert_near(metrics["loss"], found["total_loss"][i])
        golden.assert_near(metrics["lr"], found["sched/lr"][i])
        golden.assert_near(task.momentum_at(i), found["sched/momentum"][i])
        golden.assert_near(task.temperature_at(i), found["sched/teacher_temp"][i])
    golden.assert_params(step.state.params, golden.below(found, "student_final/"))
    teacher = step.state.task_state["teacher"]
    golden.assert_params(teacher, golden.below(found, "teacher_final/"))


def test_sinkhorn_uses_all_prototypes_alike(case):
    task = case.build(teacher="sinkhorn")
    state = task.init_state(case.params("teacher_init"), None)
    assert state.keys() == {"teacher"}
    logits = 0.05 * np.random.default_rng(0).normal(size=(4, 2, 16, 36))
    numbers = np.arange(16)
    counts = np.broadcast_to(numbers < 12, logits.shape[:3])
    found = jax.jit(task._probabilities, static_argnums=1)(state, "ibot", logits, counts, 0)
    np.testing.assert_allclose(found.sum(-1), counts, atol=1e-5)
    np.testing.assert_allclose(found.sum((0, 1, 2)), counts.sum() / 36, rtol=0.05)


def test_multipliers_of_layers_and_of_the_patch_embedding(case):
    """The optimizer's table has the reference's multipliers from the config."""
    table = optim.build(
        case.optimizer(), case.params("student_init"), duration=lambda d, *_: d, total_steps=6
    ).table
    about = case.about["multipliers_lr_wd_lastlayer"]
    theirs = {
        "mask_token": "backbone.mask_token",
        "backbone/cls": "backbone.cls_token",
        "backbone/pos_embed": "backbone.pos_embed",
        "backbone/patch_embed/kernel": "backbone.patch_embed.proj.weight",
        "backbone/patch_embed/bias": "backbone.patch_embed.proj.bias",
        "backbone/norm/scale": "backbone.norm.weight",
        "dino_head/dense1/kernel": "dino_head.mlp.0.weight",
        "dino_head/prototypes/kernel": "dino_head.last_layer.weight_v",
        "dino_head/prototypes/scale": "dino_head.last_layer.weight_g",
    }
    for ours, name in theirs.items():
        rate, decay, is_last = about[name]
        assert table[ours].lr_mult == pytest.approx(rate), ours
        assert table[ours].decay == decay, ours
        assert (table[ours].schedule is not None) == is_last
    blocks = {
        "norm1/scale": "norm1.weight",
        "attn/query/kernel": "attn.qkv.weight",
        "attn/out/bias": "attn.proj.bias",
        "scale1": "ls1.gamma",
        "mlp/dense1/kernel": "mlp.fc1.weight",
    }
    for ours, name in blocks.items():
        group = table[f"backbone/blocks/{ours}"]
        for i, mult in enumerate(group.lr_mult):
            rate, decay, _ = about[f"backbone.blocks.{i}.{name}"]
            assert mult == pytest.approx(rate), ours
            assert group.decay == decay, ours


def test_training_draws_masks_and_evaluation_compares_features(case):
    task = case.task
    crops = {name: x for name, x in case.batch(0).items() if name != "masked"}
    drawn = jax.eval_shape(task.augment, crops, jax.random.key(0))
    assert drawn["masked"].shape == (4, 2, 16)
    sums = jax.eval_shape(
        task.eval_sums, case.params("student_init"), {**crops, "mask": jnp.ones(4)}
    )
    assert sums["feature"].shape == (24,)
    metrics = task.metrics({"feature": np.array([3.0, 0.0]), "examples": 3})
    assert metrics == {"feature_distance": 0.0, "num_examples": 3}
    assert task.train_flops() > 0


@pytest.mark.parametrize(("side", "patch", "most"), [(224, 16, 98), (518, 14, 666)])
def test_the_most_patches_of_a_block_are_rounded_as_in_the_published_code(side, patch, most):
    given = tiny.info()
    large = given.spec["global"]._replace(shape=(2, side, side, 3))
    local = given.spec["local"]._replace(shape=(2, patch, patch, 3))
    given = given._replace(spec={"global": large, "local": local})
    model = {**tiny.MODEL, "patch_size": patch}
    task = tasks.build({"name": "dinov2", **tiny.HEAD}, model, given)
    assert task.rule.max_patches == most


def test_what_cannot_be_trained_so_is_refused():
    case = Case(CASES[0])
    with pytest.raises(UserError, match="KoLeo compares all examples"):
        case.task.check_accumulation()
    case.build(koleo_weight=0.0).check_accumulation()
    with pytest.raises(UserError, match="write shares from 0 to 1"):
        case.build(mask_ratio=[0.5, 0.1])
    with pytest.raises(UserError, match="does not fit task dinov2"):
        tasks.build({"name": "dinov2"}, case.model, steps.info((32, 32, 3)))
    assert optim.DEFAULTS["clip_scope"] == "global"
