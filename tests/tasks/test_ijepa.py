"""I-JEPA equals its reference code, from the forward pass to the teacher after nine steps."""

import jax
import numpy as np
import pytest
import self_supervised_golden as golden
import self_supervised_steps as steps

from vit_jax import tasks
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.tasks.losses.vectors import smooth_l1

CASE = "ijepa_trajectory"
ABOUT = golden.settings(CASE)
LENGTH = ABOUT["epochs"] * ABOUT["ipe"]
MODEL = {
    "name": "vit",
    "width": ABOUT["dim"],
    "depth": ABOUT["depth"],
    "num_heads": ABOUT["heads"],
    "mlp_dim": int(ABOUT["mlp"] * ABOUT["dim"]),
    "patch_size": ABOUT["patch"],
    "activation": "gelu",
    "pooling": "mean",
    "position": "sincos2d_mae",
}
TASK = {
    "name": "ijepa",
    "predictor_width": ABOUT["pdim"],
    "predictor_depth": ABOUT["pdepth"],
    "predictor_mlp_dim": int(ABOUT["mlp"] * ABOUT["pdim"]),
    "num_targets": ABOUT["npred"],
    "num_contexts": ABOUT["nenc"],
    "target_scale": ABOUT["pred"],
    "context_scale": ABOUT["enc"],
    "target_aspect": ABOUT["ar"],
    "min_keep": ABOUT["min_keep"],
    "momentum": ABOUT["ema"],
    "stretch": ABOUT["ipe_scale"],
}


def build(model=None, **fields):
    built = tasks.build({**TASK, **fields}, {**MODEL, **(model or {})}, steps.info((32, 32, 3)))
    return built.with_duration(Duration(LENGTH, 4, 4 * ABOUT["ipe"]))


def params_of(encoder, predictor):
    flat = {name.removeprefix("predictor_"): x for name, x in predictor.items()}
    tree = golden.vit(flat, ABOUT["heads"])
    tree["mask_token"] = flat["mask_token"]
    for name in ("embed", "proj"):
        tree[name] = {"kernel": flat[f"{name}.weight"].T, "bias": flat[f"{name}.bias"]}
    return {"backbone": golden.vit(encoder, ABOUT["heads"]), "predictor": tree}


def placed(masks, size):
    """Masks [block, image, n] of the reference, in a buffer of static size, and what counts."""
    numbers = np.swapaxes(masks, 0, 1)
    padding = ((0, 0), (0, 0), (0, size - numbers.shape[-1]))
    counts = np.pad(np.ones(numbers.shape, bool), padding)
    return np.pad(numbers, padding, constant_values=1).astype(np.int32), counts


def batch_of(images, enc, pred):
    context, context_counts = placed(enc, 20)
    targets, target_counts = placed(pred, 14)
    return {
        "image": golden.images(images),
        "context": context,
        "context_counts": context_counts,
        "targets": targets,
        "target_counts": target_counts,
    }


@pytest.fixture(scope="module")
def found():
    return golden.arrays(CASE)


@pytest.fixture(scope="module")
def start(found):
    student, predictor, teacher = (
        golden.below(found, f"{name}_init/") for name in ("encoder", "predictor", "target")
    )
    return params_of(student, predictor), params_of(teacher, predictor)


def test_predictions_and_targets_of_two_contexts(found, start):
    params, teacher = start
    task = build()
    several = batch_of(found["images"][0], found["forward/masks_enc"], found["forward/masks_pred"])

    @jax.jit
    def run(params):
        context = several["context"], several["context_counts"]
        targets = several["targets"], several["target_counts"]
        said = task.model.apply({"params": params}, several["image"], context, targets)
        return said, task.add_targets({"teacher": teacher}, several, 0)["tokens"]

    said, tokens = run(params)
    m = found["forward/masks_pred"].shape[-1]
    # The reference stacks targets, then contexts, then images.
    said = np.moveaxis(np.asarray(said), 0, 2)[..., :m, :]
    golden.assert_near(said.reshape(-1, *said.shape[3:]), found["forward/prediction"])
    wanted = np.stack([tokens[i][found["forward/masks_pred"][:, i]] for i in range(4)], axis=1)
    wanted = np.repeat(wanted[:, None], 2, axis=1)
    golden.assert_near(wanted.reshape(-1, *wanted.shape[3:]), found["forward/target"], 1.5e-6)


def test_nine_steps(found, start):
    optimizer = {
        "name": "adamw",
        "lr": ABOUT["lr"],
        "weight_decay": ABOUT["wd"],
        "decay_mask": r".*/kernel|.*/mask_token",
        "schedule": {
            "name": "ijepa",
            "warmup": ABOUT["warmup_steps"],
            "first": ABOUT["start_lr"] / ABOUT["lr"],
            "end": ABOUT["flr"] / ABOUT["lr"],
            "stretch": ABOUT["ipe_scale"],
        },
        "decay_schedule": {
            "name": "ijepa",
            "end": ABOUT["fwd"] / ABOUT["wd"],
            "stretch": ABOUT["ipe_scale"],
        },
    }
    task = build()
    step = steps.Steps(steps.given(task), start[0], optimizer, LENGTH, teacher=start[1])
    for i in range(ABOUT["steps"]):
        masks = (found[f"masks/step{i}/{name}"] for name in ("enc", "pred"))
        metrics = step(batch_of(found["images"][i % 2], *masks))
        golden.assert_near(metrics["lr"], found["sched/lr"][i])
        golden.assert_near(metrics["loss"], found["losses"][i])
        golden.assert_near(task.momentum_at(i), found["sched/momentum"][i])
    golden.assert_params(step.state.params, golden.below(found, "final/"))
    teacher = step.state.task_state["teacher"]["backbone"]
    golden.assert_params(teacher, golden.below(found, "target_final/"))


def test_momentum_rises_linearly_over_a_longer_run():
    with jax.enable_x64(True):
        for name, expected in golden.arrays("ijepa_schedules").items():
            if "momentum" in name:
                first, last, iters, epochs, stretch = map(float, name.split("_")[1:])
                task = build(momentum=[first, last], stretch=stretch)
                task = task.with_duration(Duration(int(iters * epochs), 1, 1))
                found = [task.momentum_at(i) for i in range(len(expected))]
                golden.assert_near(found, expected, golden.SCHEDULE)


def test_training_draws_masks_and_evaluation_sums_losses(found, start):
    task, params = build(), start[0]
    images = {"image": golden.images(found["images"][0]), "mask": np.ones(4, np.float32)}
    drawn = jax.eval_shape(task.augment, images, jax.random.key(0))
    assert drawn["context"].shape == (4, 1, 49)
    assert drawn["targets"].shape[:2] == (4, 4)
    sums = jax.eval_shape(task.eval_sums, params, images)
    assert {name: x.shape for name, x in sums.items()} == {"error": (), "examples": ()}
    metrics = task.metrics({"error": 6.0, "examples": 4})
    assert metrics == {"prediction_loss": 1.5, "num_examples": 4}
    assert task.train_flops() > 0


def test_what_cannot_be_trained_so_is_refused():
    with pytest.raises(UserError, match="encodes patches alone"):
        build({"pooling": "token"})
    with pytest.raises(UserError, match="min_keep=20"):
        build(min_keep=20)
    with pytest.raises(UserError, match="an image has 64 patches; write 0 to 64"):
        build(context_patches=65)
    build(context_patches=64)


def test_smooth_l1_has_a_slope_of_one_beyond_beta():
    grad = jax.vmap(jax.grad(lambda x: smooth_l1(x, 0.5)))(np.float32([-3, 0.25, 2]))
    np.testing.assert_allclose(grad, [-1, 0.5, 1])
