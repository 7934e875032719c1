"""The composition: order of operations, groups, state and errors."""

import re

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_updates import STRUCTURED, assert_trees_close, flat, gradients, norm, one_update, run

from vit_jax import optim
from vit_jax.errors import UserError
from vit_jax.optim import clipping

RULES = [
    "adamw",
    "nadamw",
    "sgd",
    "adafactor",
    "lamb",
    "lion",
    "muon",
    "schedule_free_adamw",
    "adopt",
]


def test_equals_optax_adamw(make, params):
    lr = optax.warmup_cosine_decay_schedule(0.0, 0.01, warmup_steps=2, decay_steps=20)
    kernels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    theirs = optax.adamw(lr, b2=0.95, weight_decay=0.1, mask=kernels)
    ours = make(
        params,
        lr=0.01,
        weight_decay=0.1,
        args={"b2": 0.95},
        schedule={"name": "cosine", "warmup": 2},
    )
    steps_ignored = optax.GradientTransformation(
        theirs.init, lambda *args: theirs.update(*args[:3])
    )
    expected = run(steps_ignored, params, 4)[0]
    assert_trees_close(run(ours, params, 4)[0], expected, rtol=0, atol=1e-6)


def test_the_two_couplings_agree_where_decay_is_divided_by_lr(make, params):
    schedule = {"name": "cosine", "warmup": 2}
    pytorch = make(params, lr=0.01, weight_decay=0.1, schedule=schedule)
    big_vision = make(
        params, lr=0.01, weight_decay=0.001, schedule=schedule, decay_coupling="schedule"
    )
    assert_trees_close(run(pytorch, params)[0], run(big_vision, params)[0], rtol=0, atol=1e-6)


def test_only_decay_moves_a_parameter_without_gradient(make, params):
    optimizer = make(params, lr=0.5, weight_decay=0.1, name="sgd", decay_mults=[["head/.*", 3.0]])
    zeros = jax.tree.map(np.zeros_like, params)
    update = jax.jit(lambda grads, p: optimizer.update(grads, optimizer.init(p), p, 0)[0])
    updates = flat(update(zeros, params))
    for name, update in updates.items():
        factor = 0.0 if not name.endswith("kernel") else 3.0 if name == "head/kernel" else 1.0
        parameter = np.asarray(flat(params)[name])
        np.testing.assert_allclose(update, -0.5 * 0.1 * factor * parameter, rtol=1e-6)


def test_frozen_gradients_do_not_count_in_the_norm(make, params):
    optimizer = make(params, name="sgd", clip_norm=1.0, lr=1.0, freeze=["head/.*"])
    grads = gradients(params)
    huge = {**grads, "head": jax.tree.map(lambda g: 1e6 * g, grads["head"])}
    update, state = jax.jit(optimizer.update), jax.jit(optimizer.init)(params)
    updates = [update(g, state, params, 0)[0] for g in (grads, huge)]
    assert_trees_close(*updates, rtol=0)
    assert norm(updates[0]) == pytest.approx(1.0, rel=1e-5)


def test_clipping_leaves_small_gradients_alone(params):
    grads = gradients(params)
    clip = jax.jit(optim.clip_by_global_norm)
    assert_trees_close(clip(grads, 1.01 * norm(grads)), grads, rtol=0)
    zeros = jax.tree.map(np.zeros_like, grads)
    assert_trees_close(clip(zeros, 1.0), zeros, rtol=0)


def test_tiny_gradients_are_clipped_as_large_ones(make, params):
    """No epsilon is added to a norm, so that 1e-4 is clipped to 1e-5."""
    optimizer = make(params, name="sgd", lr=1.0, clip_norm=1e-5)
    grads = gradients(params)
    small = jax.tree.map(lambda g: g * np.float32(1e-4 / norm(grads)), grads)
    update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params, 0)[0])
    assert norm(update(small)) == pytest.approx(1e-5, rel=1e-5)


def test_each_parameter_or_module_may_have_a_norm_of_its_own(make, params, unstack):
    """The layers of a stack are clipped one by one; queries, keys and values together."""
    grads = gradients(params)

    def clipped(scope, params, grads):
        optimizer = make(params, name="sgd", lr=1.0, clip_norm=0.5, clip_scope=scope)
        update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params, 0))
        return flat(update(grads)[0])

    found, alone = clipped("parameter", params, grads), flat(unstack(grads))
    separate = clipped("parameter", unstack(params), unstack(grads))
    assert_trees_close(flat(unstack(unflatten(found))), separate, rtol=1e-6)
    for name, g in alone.items():
        others = [n for n in alone if merged(n) == merged(name)]
        together = np.sqrt(sum(np.square(alone[n]).sum() for n in others))
        np.testing.assert_allclose(separate[name], -g * min(1, 0.5 / together), rtol=1e-5)
    found = clipped("module", params, grads)
    for name in grads:
        part = {n: x for n, x in found.items() if n.startswith(f"{name}/")}
        before = norm({n: x for n, x in flat(grads).items() if n.startswith(f"{name}/")})
        assert norm(part) == pytest.approx(min(0.5, before), rel=1e-5)


def test_modules_of_further_students_have_norms_of_their_own():
    student = {"head": {"x": 1}, "backbone": {"x": 2}, "mask_token": 3}
    tree = {**student, "students": {"a": student, "b": student}}
    parts = jax.tree.map_with_path(lambda path, _: clipping._part(path, "module"), tree)
    own = {"head": {"x": "head"}, "backbone": {"x": "backbone"}, "mask_token": "backbone"}
    of = {name: jax.tree.map(f"{name}/".__add__, own) for name in "ab"}
    assert parts == {**own, "students": of}


def merged(name):
    return re.sub("/(query|key|value)/", "/qkv/", name)


def unflatten(named):
    return flax.traverse_util.unflatten_dict(named, sep="/")


def test_late_parameters_begin_as_if_the_run_did(make, params):
    """Neither decayed nor counted before; then Adam's bias correction starts at their first."""
    keys = {"lr": 0.1, "weight_decay": 0.1, "decay_mask": ".*", "schedule": {"name": "constant"}}
    late = make(params, freeze_until=[["head/.*", 2]], **keys)
    plain = make(params, **keys)
    assert [row.late for row in late.describe() if row.path.startswith("head/")] == [0, 0]
    assert_trees_close(run(late, params, 2)[0]["head"], params["head"], rtol=0)
    found, state = run(late, params, 3)
    assert [int(state[name].count) for name in ("adamw", "adamw_late0")] == [3, 1]
    whole, _ = run(plain, params, 3)
    assert_trees_close(found["backbone"], whole["backbone"], rtol=0)
    first = jax.jit(lambda grads: plain.update(grads, plain.init(params), params, 2)[0])
    first = first(gradients(params, 2))
    assert_trees_close(found["head"], optax.apply_updates(params, first)["head"], atol=1e-7)
    with pytest.raises(UserError, match="freeze_until: schedule_free_adamw averages"):
        make(params, name="schedule_free_adamw", freeze_until=[["head/.*", 2]])
    with pytest.raises(UserError, match=r"freeze_until: 'heat/.*' matches no whole"):
        make(params, freeze_until=[["heat/.*", 2]])


def test_weight_decay_may_have_a_schedule(make, params):
    keys = {"name": "sgd", "lr": 1.0, "weight_decay": 0.04, "schedule": {"name": "constant"}}
    optimizer = make(params, decay_schedule={"name": "cosine", "end": 10.0}, **keys)
    zeros = jax.tree.map(np.zeros_like, params)
    for step, share in ((0, 0.0), (10, 0.5), (20, 1.0)):
        update, _ = optimizer.update(zeros, optimizer.init(params), params, step)
        decay = 0.04 + share * (0.4 - 0.04)
        kernel = params["head"]["kernel"]
        np.testing.assert_allclose(update["head"]["kernel"], -decay * kernel, rtol=1e-5)
    with pytest.raises(UserError, match=r"optim.decay_schedule.ned is unknown"):
        make(params, decay_schedule={"ned": 10.0}, **keys)
    with pytest.raises(UserError, match="weight_decay, which is 0; write its first value"):
        make(params, decay_schedule={"end": 10.0}, **{**keys, "weight_decay": 0.0})


@pytest.mark.parametrize(
    ("name", "args"),
    [
        *((name, {}) for name in ("adamw", *STRUCTURED)),
        ("adafactor", {"min_dim_size_to_factor": 2, "clipping_threshold": 0.5}),
    ],
)
def test_stacked_blocks_train_like_separate_ones(make, params, unstack, name, args):
    """Layer decay, Muon's matrices, LAMB's norms, Adafactor's factors see through the layer axis.

    The gradients are a function of the parameters that treats the blocks alike.
    """

    def train(params):
        keys = {"name": name, "args": args, "layer_decay": 0.75, "weight_decay": 0.1, "lr": 0.02}
        optimizer = make(params, clip_norm=1.0, **keys)

        @jax.jit
        def update(params, state, step):
            grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
            updates, state = optimizer.update(grads, state, params, step)
            return optax.apply_updates(params, updates), state

        state = jax.jit(optimizer.init)(params)
        for step in range(3):
            params, state = update(params, state, step)
        return params

    assert_trees_close(unstack(train(params)), train(unstack(params)), rtol=0, atol=2e-6)


STATE_PARTS = {
    "adamw": {"adamw/count", "adamw/mu", "adamw/nu"},
    "nadamw": {"nadamw/count", "nadamw/mu", "nadamw/nu"},
    "sgd": {"sgd/mu"},
    "lion": {"lion/count", "lion/mu"},
    "lamb": {"lamb/count", "lamb/mu", "lamb/nu"},
    "adafactor": {
        "adafactor/second_moment/count",
        "adafactor/second_moment/v_row",
        "adafactor/second_moment/v_col",
        "adafactor/second_moment/v",
        "adafactor/mu",
    },
    "muon": {
        "muon/matrices/count",
        "muon/matrices/mu",
        "muon/matrices/ns_coeffs",
        "muon/others/count",
        "muon/others/mu",
        "muon/others/nu",
    },
    "schedule_free_adamw": {
        "schedule_free_adamw/b1",
        "schedule_free_adamw/weight_sum",
        "schedule_free_adamw/step_count",
        "schedule_free_adamw/max_lr",
        "schedule_free_adamw/base_optimizer_state/count",
        "schedule_free_adamw/base_optimizer_state/nu",
        "schedule_free_adamw/z",
    },
}


@pytest.mark.parametrize("name", STATE_PARTS)
def test_state_names_are_those_of_old_checkpoints(make, params, name):
    """A changed name here is a broken resume: write a migration before changing the table."""

    def names(**keys):
        state = make(params, name=name, **keys).init(params)
        return set(flat(flax.serialization.to_state_dict(state)))

    plain, paths = names(), flat(params)
    owner = {leaf: [path for path in paths if leaf.endswith(f"/{path}")] for leaf in plain}
    parts = {leaf.removesuffix(f"/{path[0]}") if path else leaf for leaf, path in owner.items()}
    assert parts == STATE_PARTS[name]
    assert plain == names(
        clip_norm=1.0,
        weight_decay=0.1,
        decay_mults=[["head/.*", 0.5]],
        lr_mults=[["head/.*", 2.0]],
        layer_decay=0.9,
        schedule={"name": "cosine", "warmup": 3, "cooldown": 2},
        group_schedules=[["head/.*", {"name": "linear"}]],
    )


@pytest.mark.parametrize("name", STATE_PARTS)
def test_state_survives_a_checkpoint(make, params, name):
    optimizer = make(params, name=name)
    state = jax.tree.map(lambda leaf: np.full(leaf.shape, 3, leaf.dtype), optimizer.init(params))
    stored = flax.serialization.to_state_dict(state)
    restored = flax.serialization.from_state_dict(optimizer.init(params), stored)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_trees_close(restored, state, rtol=0)


@pytest.mark.parametrize("name", RULES)
def test_state_that_mirrors_parameters_ends_in_their_names(make, params, name):
    """Shardings are found by this: a leaf of a parameter's shape lies under its path."""
    state = make(params, name=name).init(params)
    shapes = {path: leaf.shape for path, leaf in flat(params).items()}
    for path, leaf in flat(flax.serialization.to_state_dict(state)).items():
        if leaf.ndim >= 2:
            assert any(path.endswith(f"/{p}") for p in shapes), path


@pytest.mark.parametrize("name", RULES)
def test_every_rule_descends_in_one_compiled_donated_update(make, name):
    target = {"blocks": {"kernel": jnp.linspace(-1, 1, 24).reshape(2, 3, 4)}, "bias": jnp.ones(4)}
    params = jax.tree.map(jnp.zeros_like, target)
    optimizer = make(params, 200, name=name, lr=0.05, schedule={"name": "constant", "warmup": 5})

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, target)) ** 2

    traces = []

    def train_step(params, state, step):
        traces.append(step)
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, step)
        return optax.apply_updates(params, updates), state

    before = float(loss(params))
    train_step = jax.jit(train_step, donate_argnums=(0, 1))
    state = jax.jit(optimizer.init)(params)
    for step in range(200):
        params, state = train_step(params, state, jnp.int32(step))
    assert float(loss(optimizer.evaluation_params(params, state))) < 0.1 * before
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["adafactor", "lamb", "muon"])
def test_sharded_over_devices(make, params, name):
    """Parameters and mirrored state split over a mesh: the same update, and the split is kept."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def split(array):
        divisible = [i for i, size in enumerate(array.shape) if size % 4 == 0]
        spec = [("fsdp" if i in divisible[-1:] else None) for i in range(array.ndim)]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    optimizer = make(params, name=name, clip_norm=1.0, weight_decay=0.1, layer_decay=0.9)
    expected = one_update(optimizer, params)
    placed = jax.device_put(params, jax.tree.map(split, params))
    state = jax.jit(optimizer.init)(params)
    state = jax.device_put(state, jax.tree.map(split, state))
    updates, _ = jax.jit(optimizer.update)(gradients(params), state, placed, 0)
    assert_trees_close(updates, expected, rtol=0, atol=1e-7)


def test_logged_rate_is_the_applied_rate(make, params):
    schedule = {"name": "rsqrt", "warmup": 3, "cooldown": 5, "timescale": 4}
    optimizer = make(params, name="sgd", args={"momentum": 0.0}, lr=0.3, schedule=schedule)
    state, ones = optimizer.init(params), jax.tree.map(np.ones_like, params)
    update = jax.jit(optimizer.update)
    for step in range(21):
        updates, _ = update(ones, state, params, step)
        assert {float(np.min(u)) for u in jax.tree.leaves(updates)} == {-float(optimizer.lr(step))}


def test_updates_keep_the_structure_and_dtypes_of_params(make, params):
    abstract = jax.eval_shape(lambda: params)
    for name in RULES:
        optimizer = make(abstract, name=name, freeze=["head/.*"])
        state = jax.eval_shape(optimizer.init, params)
        updates, new_state = jax.eval_shape(optimizer.update, params, state, params, 0)
        described = [
            jax.tree.map(lambda x: (x.shape, x.dtype), tree)
            for tree in (updates, abstract, new_state, state)
        ]
        assert described[0] == described[1], name
        assert described[2] == described[3], name


def test_other_parameters_than_built_for(make, params):
    optimizer = make(params)
    with pytest.raises(ValueError, match="head/bias"):
        optimizer.init({**params, "head": {"kernel": params["head"]["kernel"]}})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"wd": 0.1}, "config.optim.wd is unknown"),
        ({"weight_decy": 0.1}, "did you mean 'weight_decay'"),
        ({"schedule": {"warmup_steps": 3}}, "schedule.warmup_steps is unknown; did you mean"),
        ({"schedule": "cosine"}, "config.optim.schedule='cosine': write a section"),
        ({"name": "adamww"}, "config.optim.name='adamww' is no optimizer; did you mean 'adamw'"),
        ({"name": "no.such:rule"}, "package.module:function"),
        ({"args": {"beta2": 0.9}}, "args.beta2 is no argument of adamw"),
        ({"args": {"mu_dtype": "float17"}}, "args.mu_dtype='float17' is not a floating-point type"),
        ({"args": {"b1": float("nan")}}, "config.optim.args.b1=nan: write a number"),
        ({"args": {"eps": 10**400}}, "config.optim.args.eps=1.*: write a number"),
        ({"name": "lamb", "decay_coupling": "schedule"}, "write 'lr'"),
        ({"decay_coupling": "rate"}, "decay_coupling='rate' is unknown"),
        ({"weight_decay": 0.1, "decay_mask": "kernel"}, "decay_mask: 'kernel' matches no whole"),
        ({"lr_mults": [["heads/.*", 2.0]]}, "lr_mults: 'heads/.*' matches no whole"),
        ({"lr_mults": [[".*", 2.0], ["head/.*", 3.0]]}, "'head/.*' is never reached"),
        ({"lr_mults": [["head/.*"]]}, r"write a list of \[a text, a number\]"),
        ({"freeze": ["(head"]}, "freeze: '\\(head' is not a regular expression"),
        ({"freeze": [".*"]}, "every parameter is frozen"),
        ({"freeze": [3]}, r"config.optim.freeze=\[3\]: write a list of texts"),
        ({"group_schedules": [["x", {"name": "cosine"}]]}, "group_schedules: 'x' matches no"),
        ({"group_schedules": [["head/.*", {"nam": "cosine"}]]}, r"group_schedules\[0\].nam"),
        ({"freeze": "head/.*"}, "config.optim.freeze='head/.*': write a list of texts"),
        ({"lr": "0.1"}, "config.optim.lr='0.1': write a number"),
        ({"lr_mults": [["head/.*", "2"]]}, r"lr_mults=.*: write a list of \[a text, a number\]"),
        ({"schedule": {"warmup": [3]}}, r"schedule.warmup=\[3\] is no duration"),
        ({"layer_decay": 0.0}, "layer_decay=0.0: write a number, above 0 and at most 1"),
        ({"layer_decay": 0.5, "blocks": r"layers_(\d+)/.*"}, "no blocks found"),
        ({"lr": -1.0}, "config.optim.lr=-1.0: write a number, at least 0"),
        ({"lr": float("nan")}, "config.optim.lr=nan: write a number, at least 0"),
        ({"blocks": r"layers_\d+/.*"}, "put the number of the block in a group"),
        ({"layer_decay": 0.5, "blocks": r"(.*)/.*"}, "its group matches .*, which is no number"),
        ({"name": "adafactor", "args": {"momentum": None}}, "momentum=None: write a number"),
        ({"args": {"b1": "0.9"}}, "config.optim.args.b1='0.9': write a number"),
    ],
)
def test_mistakes_are_named(make, params, keys, message):
    with pytest.raises(UserError, match=message):
        make(params, **keys)


@pytest.mark.parametrize("name", ["sgd", "adafactor", "adamw", "nadamw", "muon", "lion"])
@pytest.mark.parametrize(
    "dtype", ["bf16", "int8", "complex64", ">f4", "float64", "", "f4,f4", "f4("]
)
def test_no_rule_stores_its_momentum_in_what_is_no_float(make, params, name, dtype):
    key = "momentum_dtype" if name in ("sgd", "adafactor") else "mu_dtype"
    with pytest.raises(UserError, match=f"^config.optim.args.{key}=.* is not a floating-point"):
        make(params, name=name, args={key: dtype})


def test_config_dicts_are_mappings(params):
    from ml_collections import ConfigDict, FrozenConfigDict

    from vit_jax.config.durations import Duration

    duration = Duration(total=20, batch_size=10, num_examples=100)
    config = ConfigDict({"lr_mults": [["head/.*", 2.0]], "schedule": {"warmup": "10%"}})
    for kind in (config, FrozenConfigDict(config)):
        optimizer = optim.build(kind, params, duration=duration)
        assert float(optimizer.lr(1)) == pytest.approx(0.5e-3, rel=0.01)
