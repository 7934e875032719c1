"""MAE as its authors' code computes it, through the step of training; and what the task adds."""

import math

import flax.linen as nn
import jax
import numpy as np
import pytest
import self_supervised_golden as golden

from vit_jax import models, optim, tasks
from vit_jax.checkpoints.store import Store
from vit_jax.config import default_config
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.models.layers.positions import sincos_table
from vit_jax.optim import schedules
from vit_jax.parallel import sharding
from vit_jax.training import step
from vit_jax.types import ArraySpec, DataInfo

ENCODER = {"patch_size": 8, "width": 32, "depth": 2, "num_heads": 4, "mlp_dim": 64}
MODEL = {"name": "vit", **ENCODER, "activation": "gelu", "unroll": 1}
TASK = {"name": "masked", "decoder": {"width": 24, "depth": 2, "num_heads": 3, "mlp_dim": 48}}
SPEC = {
    "image": ArraySpec((32, 32, 3), np.dtype(np.float32)),
    "noise": ArraySpec((16,), np.dtype(np.float32)),
}
PRETRAINED = {"decay_mask": r".*/(?:kernel|cls|mask_token)"}
FINE_TUNED = {"decay_mask": r".*/kernel", "layer_decay": 0.75}


def masked(**fields):
    return tasks.build({**TASK, **fields}, MODEL, DataInfo(SPEC, 0))


def trainer(task, case, params, sizes=(1, 1, 1), **keys):
    """The compiled step of a task and its first state, with the settings of a stored case."""
    iters = case.get(
        "iters_per_epoch", case["updates"] // case["epochs"] if "updates" in case else 2
    )
    total = case["epochs"] * iters
    mesh = sharding.make_mesh(
        dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)]
    )
    config = default_config().optim.to_dict()
    config["schedule"] |= {"warmup": case["warm"] * iters, "end": case["min_lr"] / case["lr"]}
    config |= {"lr": case["lr"], "weight_decay": case["wd"], "args": {"b2": case["betas"][1]}}
    config |= keys
    boxed = tasks.boxed_params(task)
    config["freeze"] = task.frozen(nn.unbox(boxed), [])
    duration = Duration(total, case["B"], case["B"] * iters)
    optimizer = optim.build(config, nn.unbox(boxed), duration=duration)
    _, abstract = step.init_state(task, optimizer, boxed, seed=0, ema=False, mesh=mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    start = step.State(
        step=np.int32(0), seed=np.uint32(0), params=params, bad_steps=np.int32(0),
        opt_state=jax.jit(optimizer.init)(params), ema=None,
    )  # fmt: skip
    state = jax.tree.map(jax.device_put, jax.device_get(start), places)
    train_step = step.make_train_step(task, optimizer, abstract, mesh)
    return train_step, state, mesh


def trained(task, case, params, batches, resume_in=None, **keys):
    """The losses, the norms of gradients and the last parameters of a run over `batches`.

    resume_in: a folder through which the state goes after half of them.
    """
    train_step, state, mesh = trainer(task, case, params, **keys)
    rows, logged = sharding.local_rows(mesh, case["B"]), []
    with sharding.activate(mesh):
        for i, batch in enumerate(batches):
            if resume_in and i == len(batches) // 2:
                state = through_checkpoint(state, resume_in)
            state, metrics = train_step(state, sharding.place(batch, rows, mesh, case["B"]))
            logged.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return *np.array(logged).T, jax.device_get(state.params)


def through_checkpoint(state, folder):
    """The state as it is restored from a checkpoint of it, bit for bit the same."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Store(folder) as store:
        store.save(int(state.step), state, {})
        store.wait()
        restored = store.restore_newest(abstract)
    assert not restored.missing
    both = jax.device_get(state), jax.device_get(restored.tree)
    jax.tree.map(np.testing.assert_array_equal, *both)
    return restored.tree


def pretraining():
    case, stored = golden.settings("mae_trajectory"), golden.arrays("mae_trajectory")
    images = golden.images(stored["images"])
    batches = [{"image": images[i % 2], "noise": noise} for i, noise in enumerate(stored["noise"])]
    start = golden.masked_autoencoder(golden.below(stored, "init/"), 4, 3)
    return case, stored, start, batches


def test_pretraining_follows_the_published_code(tmp_path):
    """On two devices, and through a checkpoint."""
    case, stored, start, batches = pretraining()
    keys = {**PRETRAINED, "sizes": (2, 1, 1), "resume_in": tmp_path}
    losses, norms, params = trained(masked(), case, start, batches, **keys)
    golden.assert_near(losses, stored["losses"], golden.FORWARD)
    golden.assert_near(norms, stored["grad_norms"], golden.TRAINED)
    golden.assert_params(params, golden.below(stored, "final/"))


def test_fine_tuning_follows_the_published_code():
    """Mean pooling: the class token takes part, and the norm comes after the mean."""
    case, stored = (read("mae_finetune_global_pool") for read in (golden.settings, golden.arrays))
    fields = {"pooling": "mean", "class_token": True, "last_norm": False, "fc_norm": True}
    spec = {"image": SPEC["image"], "label": ArraySpec((), np.dtype(np.int32))}
    task = tasks.build(
        {"name": "classification"}, {**MODEL, **fields}, DataInfo(spec, case["ncls"])
    )

    flat = golden.below(stored, "init/")
    norm = {"scale": flat["fc_norm.weight"], "bias": flat["fc_norm.bias"]}
    head = {"kernel": flat["head.weight"].T, "bias": flat["head.bias"]}
    start = {"backbone": {**golden.vit(flat, 4), "fc_norm": norm}, "head": head}
    images = golden.images(stored["images"])
    batches = [
        {"image": images[i % 2], "label": stored["labels"][i % 2]} for i in range(case["steps"])
    ]
    logits = jax.jit(task.model.apply)({"params": start}, images[0])
    golden.assert_near(logits, stored["logits"])
    losses, norms, params = trained(task, case, start, batches, **FINE_TUNED)
    golden.assert_near(losses, stored["losses"], golden.FORWARD)
    golden.assert_near(norms, stored["grad_norms"], golden.TRAINED)
    golden.assert_params(params, golden.below(stored, "final/"))


def test_tables_and_schedules_are_those_of_the_published_code():
    stored, case = golden.arrays("mae_tables"), golden.settings("mae_tables")
    for width, side in ((32, 4), (24, 4), (64, 7), (96, 14)):
        table = sincos_table(side, side, width, class_row=True)
        golden.assert_near(table[0], stored[f"sincos/dim{width}_grid{side}_cls"], 1e-7)
    for name, told in case["schedules"].items():
        iters, accum, epochs = (told[k] for k in ("iters_per_epoch", "accum_iter", "epochs"))
        total, lr = epochs * iters, told["lr"]
        spec = {**default_config().optim.to_dict()["schedule"], "end": told["min_lr"] / lr}
        spec["warmup"] = told["warmup_epochs"] * iters
        with jax.enable_x64(True):
            schedule = schedules.build(spec, total_steps=total, duration=int)
            # The rate stays as it is while gradients are added up.
            steps = np.arange(total)
            found = lr * np.asarray(schedule(steps - steps % iters % accum), np.float64)
        golden.assert_near(found, stored[f"sched/{name}"][:, 0], golden.SCHEDULE)
        golden.assert_near(0.3 * found, stored[f"sched/{name}"][:, 1], golden.SCHEDULE)


def test_groups_of_parameters_are_those_of_the_published_code():
    groups = golden.settings("mae_tables")["param_groups"]

    def theirs(name):
        """(decayed, multiplier) by parameter."""
        return {
            parameter: (group["weight_decay"] > 0, group.get("lr_scale", 1.0))
            for group in groups[name]
            for parameter in group["names"]
        }

    def ours(task, **keys):
        config = default_config().optim.to_dict() | {"weight_decay": 0.05, **keys}
        params = tasks.abstract_params(task)
        config["freeze"] = task.frozen(params, [])
        optimizer = optim.build(config, params, duration=Duration(6, 4, 8))
        return {group.path: group for group in optimizer.describe()}

    found, expected = ours(masked(), **PRETRAINED), theirs("pretrain")
    assert [name for name, group in found.items() if group.frozen] == [
        "backbone/pos_embed", "decoder/pos_embed",
    ]  # fmt: skip
    pairs = {
        "backbone/cls": "cls_token",
        "decoder/mask_token": "mask_token",
        "decoder/predict/kernel": "decoder_pred.weight",
        "backbone/blocks/attn/query/kernel": "blocks.0.attn.qkv.weight",
        "backbone/blocks/attn/query/bias": "blocks.0.attn.qkv.bias",
        "decoder/blocks/norm1/scale": "decoder_blocks.0.norm1.weight",
    }
    assert {n: bool(found[n].decay) for n in pairs} == {n: expected[m][0] for n, m in pairs.items()}
    spec = {**SPEC, "label": ArraySpec((), np.dtype(np.int32))}
    task = tasks.build({"name": "classification"}, MODEL, DataInfo(spec, 7))
    found, expected = ours(task, **FINE_TUNED), theirs("finetune_global_pool_False")
    pairs = {
        "backbone/cls": "cls_token",
        "backbone/pos_embed": "pos_embed",
        "backbone/patch_embed/kernel": "patch_embed.proj.weight",
        "backbone/norm/scale": "norm.weight",
        "head/kernel": "head.weight",
    }
    for name, other in pairs.items():
        assert (bool(found[name].decay), found[name].lr_mult) == expected[other], name
    layers = [expected[f"blocks.{i}.mlp.fc1.weight"][1] for i in (0, 1)]
    assert found["backbone/blocks/mlp/dense1/kernel"].lr_mult == tuple(layers)


def test_masks_follow_from_seed_and_row_and_are_of_the_stated_size():
    task = masked(mask_ratio=0.6)
    batch = {"image": np.zeros((8, 32, 32, 3), np.float32)}
    found = jax.jit(task.augment)(batch, jax.random.key(3))
    kept, restore = (np.asarray(found[name]) for name in ("kept", "restore"))
    assert kept.shape == (8, 6)  # int(16 · 0.4)
    for row in range(8):
        assert sorted(restore[row]) == list(range(16))
        np.testing.assert_array_equal(restore[row][kept[row]], range(6))
    assert len({tuple(sorted(row)) for row in kept}) > 4


def test_evaluation_and_pictures():
    spec = {"image": ArraySpec((32, 32, 3), np.dtype(np.uint8))}
    task = tasks.build(TASK, MODEL, DataInfo(spec, 0))
    params = jax.jit(lambda: nn.unbox(task.init(jax.random.key(0))))()
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    batch = {"image": images, "mask": np.array([1, 1, 0], np.float32)}
    both = jax.jit(lambda *args: (task.eval_sums(*args), task.predict(*args)))
    sums, found = jax.device_get(both(params, batch))
    metrics = task.metrics(sums)
    assert metrics == {"loss": pytest.approx(found["error"][:2].mean()), "num_examples": 2}
    same = (found["reconstructed"] == images).all(-1).mean()
    assert same == pytest.approx(0.25, abs=0.01)
    gray = (found["masked"] == 128).all(-1).mean()
    assert gray == pytest.approx(0.75, abs=0.01)
    examples = {**found, "image": images}
    assert task.pictures(examples)[0].shape == (32, 96, 3)
    assert task.result_lines(examples, 1)[0] == [f"error {found['error'][0]:.3f}"]
    assert len(task.sections(examples)) == 1
    # A quarter of the patches is encoded, all of them are decoded.
    encoder = models.flops(task.model.backbone, 32)
    assert task.train_flops() < 3 * models.flops(task.model, 32) - 1.5 * encoder


@pytest.mark.parametrize(
    ("model", "grid", "class_row"),
    [
        ({"position_grid": [3, 5]}, (3, 5), True),
        ({"name": "flexivit_s", "kernel_size": 4, "table_grid": 3}, (3, 3), False),
    ],
)
def test_the_fixed_table_has_the_grid_that_the_model_keeps(model, grid, class_row):
    task = tasks.build(TASK, {**MODEL, **model}, DataInfo(SPEC, 0))
    table = jax.jit(lambda: nn.unbox(task.init(jax.random.key(0)))["backbone"]["pos_embed"])()
    np.testing.assert_array_equal(table, sincos_table(*grid, 32, class_row=class_row))
    batch = {"image": jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)}
    assert jax.eval_shape(task.predict, tasks.abstract_params(task), batch)["error"].shape == (1,)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ({"num_classes": 3}, {}, "pre-trains a ViT alone"),
        ({"num_registers": 2}, {}, "pre-trains a ViT alone"),
        ({}, {"mask_ratio": 1.5}, "mask_ratio=1.5: write a number from 0 to 1"),
        ({}, {"mask_ratio": 0.99}, "keeps 0 of 16 patches"),
        ({}, {"decoder": {"widht": 3}}, "config.task.decoder.widht is unknown"),
        ({}, {"decoder": {"width": 10}}, "config.task.decoder.width=10: the sines and cosines of"),
        ({"width": 10, "num_heads": 2}, {}, "config.model.width=10: the sines and cosines of"),
    ],
)
def test_mistakes_are_refused(model, fields, message):
    with pytest.raises(UserError, match=message):
        tasks.build({**TASK, **fields}, {**MODEL, **model}, DataInfo(SPEC, 0))
