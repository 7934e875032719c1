"""SimMIM equals its reference code, from the forward pass to the parameters after six steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import self_supervised_golden as golden
import self_supervised_steps as steps

from vit_jax import tasks
from vit_jax.errors import UserError

CASE = "simmim"
ABOUT = golden.settings(CASE)
MODEL = {
    "name": "vit",
    "width": ABOUT["dim"],
    "depth": ABOUT["depth"],
    "num_heads": ABOUT["heads"],
    "mlp_dim": ABOUT["mlp"] * ABOUT["dim"],
    "patch_size": ABOUT["patch"],
    "activation": "gelu",
    "key_bias": False,
    "layer_scale": ABOUT["iv"],
    "position": "learned" if ABOUT["ape"] else "none",
    "position_bias": "shared_table" if ABOUT["shared_rpb"] else "table",
}
TASK = {"name": "simmim", "cell": ABOUT["mpatch"], "ratio": ABOUT["ratio"]}


def build(**fields):
    return tasks.build({**TASK, **fields}, MODEL, steps.info((32, 32, 3)))


def params_of(flat):
    """A reference's parameters in our tree; the pixels of a patch are (row, column, color)."""
    encoder = golden.below(flat, "encoder.")
    backbone = golden.vit(encoder, ABOUT["heads"])
    table = encoder["rel_pos_bias.relative_position_bias_table"]
    backbone["position_bias"] = {"table": table}
    kernel = flat["decoder.0.weight"].reshape(3, 4, 4, -1).transpose(3, 1, 2, 0)
    bias = flat["decoder.0.bias"].reshape(3, 4, 4).transpose(1, 2, 0)
    decoder = {"kernel": kernel, "bias": bias}
    return {"backbone": backbone, "mask_token": encoder["mask_token"], "decoder": decoder}


def batches(found):
    for images, masks in zip(found["images"], found["masks"], strict=True):
        yield {"image": golden.images(images), "masked": masks.reshape(len(masks), -1) > 0}


@pytest.fixture(scope="module")
def found():
    return golden.arrays(CASE)


def test_six_steps(found):
    iters, base = ABOUT["iters_per_epoch"], ABOUT["lr"]
    optimizer = {
        "name": "adamw",
        "lr": base,
        "weight_decay": ABOUT["wd"],
        "clip_norm": ABOUT["clip"],
        "decay_mask": r".*/kernel|mask_token|.*/table",
        "schedule": {
            "name": "simmim_stair",
            "warmup": ABOUT["warmup_epochs"] * iters,
            "first": ABOUT["wlr"] / base,
            "boundaries": [epoch * iters for epoch in ABOUT["multisteps_epochs"]],
            "factors": [ABOUT["gamma"]],
        },
    }
    task, params = build(), params_of(golden.below(found, "params/"))
    step = steps.Steps(steps.given(task), params, optimizer, ABOUT["epochs"] * iters)
    both = list(batches(found))
    rebuild = jax.jit(lambda batch: task.model.apply({"params": params}, *batch))
    rebuilt = rebuild((both[0]["image"], both[0]["masked"]))
    golden.assert_near(rebuilt, golden.images(found["reconstruction"]))
    for i in range(ABOUT["steps"]):
        metrics = step(both[i % 2])
        golden.assert_near(metrics["lr"], found["sched/lr"][i])
        golden.assert_near(metrics["loss"], found["losses"][i])
        golden.assert_near(metrics["grad_norm"], found["grad_norms"][i], golden.TRAINED)
    golden.assert_params(step.state.params, golden.below(found, "final/"))


def test_training_draws_masks_and_evaluation_rebuilds_images(found):
    task = build()
    batch = next(batches(found))
    images = {"image": batch["image"], "mask": jnp.ones(4)}
    drawn = jax.jit(task.augment)(images, jax.random.key(1))
    assert (drawn["masked"].sum(1) == 4 * np.ceil(16 * 0.6)).all()
    params = params_of(golden.below(found, "params/"))
    predicted, sums = jax.eval_shape(
        lambda batch: (task.predict(params, batch), task.eval_sums(params, batch)), images
    )
    assert sums.keys() == {"error", "examples"}
    metrics = task.metrics({"error": 6.0, "examples": 4})
    assert metrics == {"masked_l1": 1.5, "num_examples": 4}
    shown = {name: np.ones(x.shape, x.dtype) for name, x in predicted.items()}
    shown["image"] = np.zeros((4, 32, 32, 3), np.uint8)
    assert task.pictures(shown)[0].shape == (32, 64, 3)
    assert task.summaries(shown)[0] == "error 1.000"


@pytest.mark.parametrize(
    ("fields", "message"), [({"cell": 6}, "multiple of the patch"), ({"ratio": 0.0}, "above 0")]
)
def test_fields_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        build(**fields)
