"""Groups of parameters: decay, multipliers, schedules, layers, frozen or not."""

import re

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_updates import STRUCTURED, flat, one_update, run

from vit_jax import models
from vit_jax.config import default_config


def test_default_mask_decays_kernels_alone(make, params):
    rows = make(params, weight_decay=0.1).describe()
    assert [row.path for row in rows] == sorted(flat(params))
    assert {row.path for row in rows if row.decay} == {
        "backbone/patch_embed/kernel",
        "backbone/blocks/attn/query/kernel",
        "backbone/blocks/attn/out/kernel",
        "backbone/blocks/mlp/dense1/kernel",
        "head/kernel",
    }


def test_lr_mults_first_match_wins(make, params):
    mults = [["head/bias", 0.0], ["head/.*", 10.0], [".*/cls", 0.5]]
    plain = flat(one_update(make(params), params))
    scaled = flat(one_update(make(params, lr_mults=mults), params))
    expected = {"head/bias": 0.0, "head/kernel": 10.0, "backbone/cls": 0.5}
    for name in plain:
        np.testing.assert_allclose(
            scaled[name], expected.get(name, 1.0) * np.asarray(plain[name]), rtol=1e-6, err_msg=name
        )


def test_group_schedules(make, params):
    groups = [["head/.*", {"name": "constant"}], [".*/cls", {"name": "constant", "warmup": 10}]]
    optimizer = make(params, schedule={"name": "constant", "warmup": 4}, group_schedules=groups)
    late = flat(one_update(optimizer, params, step=15))
    early = flat(one_update(optimizer, params, step=1))
    expected = {"head/kernel": 1.0, "head/bias": 1.0, "backbone/cls": 0.1}
    for name in late:
        np.testing.assert_allclose(
            early[name], expected.get(name, 0.25) * np.asarray(late[name]), rtol=1e-5, err_msg=name
        )
    assert float(optimizer.lr(1)) == pytest.approx(0.25e-3)


@pytest.mark.parametrize("name", ["adamw", *STRUCTURED])
def test_frozen_parameters_stay_and_keep_no_state(make, params, name):
    optimizer = make(
        params, name=name, freeze=["backbone/(patch_embed|pos_embed).*"], weight_decay=0.1
    )
    after, state = run(optimizer, params)
    before, after = flat(params), flat(after)
    frozen = {row.path for row in optimizer.describe() if row.frozen}
    assert frozen == {name for name in before if "patch_embed" in name or "pos_embed" in name}
    for path in before:
        assert np.array_equal(before[path], after[path]) == (path in frozen), path
    names = flat(flax.serialization.to_state_dict(state))
    assert not any("patch_embed" in name or "pos_embed" in name for name in names)


def test_layer_decay_table(make, params, unstack):
    rows = {row.path: row.lr_mult for row in make(unstack(params), layer_decay=0.5).describe()}
    stem = ("patch_embed/kernel", "patch_embed/bias", "pos_embed", "cls")
    assert {rows[f"backbone/{name}"] for name in stem} == {0.5**4}
    assert [rows[f"backbone/blocks_{i}/norm1/scale"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert {rows["backbone/norm/scale"], rows["head/kernel"], rows["head/bias"]} == {1.0}
    stacked = {row.path: row.lr_mult for row in make(params, layer_decay=0.5).describe()}
    assert stacked["backbone/blocks/norm1/scale"] == (0.125, 0.25, 0.5)


def test_layers_of_a_frozen_teacher_do_not_count(make, params):
    teacher = jax.tree.map(lambda x: x[:2] if x.shape[:1] == (3,) else x, params)
    both = {**params, "teacher": teacher}
    rows = {
        r.path: r.lr_mult for r in make(both, layer_decay=0.5, freeze=["teacher/.*"]).describe()
    }
    assert rows["backbone/blocks/norm1/scale"] == (0.125, 0.25, 0.5)


def test_the_stem_of_a_text_tower_is_its_lowest_layer():
    stem = re.compile(default_config().optim.stem)
    for name in ("token_embed", "segment_embed", "pos_embed", "embed_norm/scale"):
        assert stem.fullmatch(f"text/{name}"), name


def test_defaults_know_the_names_of_our_models(make):
    """Decay mask, blocks and stem are patterns over names that the models choose."""
    model = models.build(
        "vit_s16",
        num_classes=10,
        num_registers=2,
        distill_token=True,
        layer_scale=1e-5,
        pooling="map",
        class_token=True,
    )
    images = jnp.zeros((1, 32, 32, 3))
    params = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), images)["params"]))
    rows = make(params, weight_decay=0.1, layer_decay=0.75).describe()
    stem = {row.path for row in rows if row.lr_mult == 0.75**13}
    layers = {row.path for row in rows if isinstance(row.lr_mult, tuple)}
    top = {row.path for row in rows if row.lr_mult == 1.0}
    tokens = ("cls", "distill", "registers")
    assert stem == {
        f"backbone/{name}"
        for name in ("patch_embed/kernel", "patch_embed/bias", "pos_embed", *tokens)
    }
    assert layers == {row.path for row in rows if "/blocks/" in row.path}
    assert top == {row.path for row in rows if "norm/" in row.path or "head" in row.path} - layers
    undecayed = {row.path.rpartition("/")[2] for row in rows if not row.decay}
    assert undecayed == {
        *("bias", "scale", "scale1", "scale2"),
        *("pos_embed", *tokens, "probe"),
    }
    names = flat(jax.eval_shape(make(params, name="muon").init, params)["muon"].matrices.mu)
    assert {name.removeprefix("backbone/blocks/") for name in names} == {
        *(f"attn/{part}/kernel" for part in ("query", "key", "value", "out")),
        *(f"mlp/{part}/kernel" for part in ("dense1", "dense2")),
    }
