"""Heads and losses of self-distillation equal those of the reference code of DINO and DINOv2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import self_supervised_golden as golden

from vit_jax.models.heads.prototypes import PrototypeHead
from vit_jax.optim.groups import named_leaves
from vit_jax.parallel import sharding
from vit_jax.tasks.losses import prototypes, vectors


@pytest.mark.parametrize("case", ["layers1", "layers2", "layers3"])
def test_the_head_and_its_gradients(case):
    found = golden.below(golden.arrays("dino_head"), f"{case}/")
    about = golden.settings("dino_head")[case]
    names = {"num_prototypes": "out", "depth": "nlayers", "hidden": "hidden"}
    head = PrototypeHead(**{name: about[key] for name, key in names.items()}, bottleneck=10)
    params = golden.prototype_head(golden.below(found, "params/"))

    def run(params, x):
        out = head.apply({"params": params}, x)
        return (out * found["cotangent"]).sum(), out

    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, out), (grads, grad_x) = run(params, found["x"])
    golden.assert_near(out, found["out"])
    golden.assert_near(grad_x, found["grad_x"], golden.TRAINED)
    expected = named_leaves(golden.prototype_head(golden.below(found, "grads/")))
    for name, grad in expected.items():
        golden.assert_near(named_leaves(grads)[name], grad, golden.TRAINED, name)
    assert ("prototypes/scale" in expected) == about["weight_g_trainable"]


def test_dino_centers_with_the_batches_before():
    found, about = golden.arrays("dino_loss"), golden.settings("dino_loss")
    crops, batch = about["ncrops"], about["batch"]
    temperatures = found["sched/teacher_temp_per_epoch"].astype(np.float32)
    pairs = prototypes.num_pairs(crops, 2, skip_same=True)
    assert pairs == 2 * crops - 2

    @jax.jit
    def step(student, teacher, center, temperature):
        def loss_fn(student):
            probs = prototypes.centered_probabilities(teacher, center, temperature)
            student, probs = (x.reshape(-1, batch, x.shape[-1]) for x in (student, probs))
            return prototypes.crop_losses(student, probs, skip_same=True).mean() / pairs

        loss, grad = jax.value_and_grad(loss_fn)(student)
        return loss, grad, prototypes.updated_center(center, teacher)

    center = found["center_before"][0]
    for i, student in enumerate(found["student_logits"]):
        golden.assert_near(center, found["center_before"][i])
        temperature = temperatures[found["epoch"][i]]
        loss, grad, center = step(student, found["teacher_logits"][i], center, temperature)
        golden.assert_near(loss, found["losses"][i])
        golden.assert_near(grad, found["grad_student"][i], golden.TRAINED)
    golden.assert_near(center, found["center_after_last"][0])


@pytest.fixture(scope="module")
def losses():
    return golden.arrays("dinov2_losses")


def test_sinkhorn_is_the_same_on_one_and_on_eight_devices(losses):
    sinkhorn = jax.jit(prototypes.sinkhorn_probabilities, static_argnames="iterations")
    mesh = sharding.data_mesh(jax.devices())
    for temperature in (0.04, 0.07):
        for n in (1, 3):
            logits = losses["sinkhorn/dino_logits"]
            expected = losses[f"sinkhorn/dino_temp{temperature}_iters{n}"]
            golden.assert_near(sinkhorn(logits, temperature, iterations=n), expected)
            # Padding fills a buffer of static size, and has no part in the sums.
            padded = np.concatenate([logits, 50 * np.ones((4, 20), np.float32)])
            spread = [padded, np.arange(16) < 12]
            spread = jax.device_put(spread, sharding.batch_sharding(mesh))
            found = sinkhorn(spread[0], temperature, spread[1], iterations=n)
            golden.assert_near(found[:12], expected)
            assert not np.any(found[12:])
    found = sinkhorn(losses["sinkhorn/ibot_logits"], 0.07)
    golden.assert_near(found, losses["sinkhorn/ibot_temp0.07_iters3"])


def test_dinov2_keeps_centers_of_class_and_patch_tokens(losses):
    @jax.jit
    def step(logits, center):
        probs = prototypes.centered_probabilities(logits, center, 0.05)
        weights = jnp.ones(logits.shape[:-1])
        return probs, prototypes.updated_center(center, logits, weights)

    for kind in ("dino", "ibot"):
        center = jnp.zeros(20)
        for i in range(4):
            logits = losses[f"centering/{kind}_logits_{i}"]
            golden.assert_near(center, losses[f"centering/{kind}_center_used_{i}"].ravel())
            probs, center = step(logits, center)
            golden.assert_near(probs, losses[f"centering/{kind}_probs_{i}"])


def test_dinov2_sums_over_all_pairs_of_crops(losses):
    student, teacher = losses["dino/student"], losses["dino/teacher_probs"]

    def loss_fn(student):
        return prototypes.crop_losses(student, teacher).mean()

    loss, grad = jax.jit(jax.value_and_grad(loss_fn))(student)
    golden.assert_near(loss, losses["dino/loss"])
    golden.assert_near(grad, losses["dino/grad"], golden.TRAINED)


def test_ibot_weighs_each_crop_with_a_mask_alike(losses):
    masks = losses["ibot/masks"]
    weights = prototypes.patch_weights(masks)
    golden.assert_near(weights[masks], losses["ibot/masks_weight"])
    cases = {
        "ibot": ("student_masked", "teacher_probs_masked", weights[masks]),
        "ibot_dense": ("student", "teacher_probs", weights),
    }
    for case, (student, teacher, weights) in cases.items():

        def loss_fn(student, teacher=losses[f"{case}/{teacher}"], weights=weights):
            losses = prototypes.cross_entropies(student, teacher)
            return (losses * weights).sum() / len(masks)

        loss, grad = jax.jit(jax.value_and_grad(loss_fn))(losses[f"{case}/{student}"])
        golden.assert_near(loss, losses[f"{case}/loss"])
        expected = losses[f"{case}/grad{'_student_masked' if case == 'ibot' else ''}"]
        golden.assert_near(grad, expected, golden.TRAINED)


@pytest.mark.parametrize("case", ["koleo0", "koleo1"])
def test_koleo_spreads_vectors(losses, case):
    found = golden.below(losses, f"{case}/")
    loss, grad = jax.jit(jax.value_and_grad(lambda x: vectors.koleo_losses(x).mean()))(found["x"])
    golden.assert_near(loss, found["loss"])
    golden.assert_near(grad, found["grad"], golden.TRAINED)
    nearest = jax.jit(lambda x: vectors.nearest_others(vectors.unit(x)))(found["x"])
    np.testing.assert_array_equal(nearest, found["neighbour"])


def test_smooth_l1_is_quadratic_near_zero_and_linear_beyond():
    found = vectors.smooth_l1(jnp.array([-3.0, -1.0, -0.5, 0.0, 2.0]))
    np.testing.assert_allclose(found, [2.5, 0.5, 0.125, 0.0, 1.5])


def test_a_batch_without_masked_patches_changes_no_center():
    center = jnp.arange(3.0)
    found = prototypes.updated_center(center, jnp.ones((4, 3)), jnp.zeros(4))
    np.testing.assert_array_equal(found, center)
