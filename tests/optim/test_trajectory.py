"""Same recipe, same result: whole runs of both references, with our model and optimizer."""

import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sampled

from vit_jax.models import Classifier
from vit_jax.models.mixer import Mixer
from vit_jax.models.vit import VisionTransformer

pytestmark = pytest.mark.usefixtures("all_optimizations")

# The references' parameter names, by what they are called here; applied in order.
RENAMES = [
    (r"^MAPHead_0/LayerNorm_0", "backbone/map_head/norm"),
    (r"^MAPHead_0", "backbone/map_head"),
    (r"^Transformer/posembed_input/pos_embedding|^pos_embedding", "backbone/pos_embed"),
    (r"^Transformer/encoder_norm", "backbone/norm"),
    (r"^Transformer/encoderblock", "backbone/blocks"),
    (r"^MixerBlock", "backbone/blocks"),
    (r"^pre_head_layer_norm", "backbone/norm"),
    (r"^embedding|^stem", "backbone/patch_embed"),
    (r"^cls", "backbone/cls"),
    (r"^pre_logits", "head/pre_logits"),
    (r"LayerNorm_0", "norm1"),
    (r"LayerNorm_1", "norm2"),
    (r"MultiHeadDotProductAttention_0", "attn"),
    (r"MlpBlock_0", "mlp"),
    (r"Dense_0", "dense1"),
    (r"Dense_1", "dense2"),
]
POOLING = {"gap": "mean", "map": "map", "token": "token"}
POSITION = {"learn": "learned", "sincos2d": "sincos2d"}

BIG_VISION = {
    # case: config.optim.name and args.
    "trajectory_s16_recipe_bf16mu": ("adamw", {"mu_dtype": "bfloat16"}),
    "trajectory_i21k_adafactor_sigmoid": ("adafactor", {}),
}
# A bfloat16 momentum may flip by one step of its own: so far may a parameter then end up.
ONE_FLIP = 1e-4


def renamed(arrays, prefix=""):
    """Our flat parameters from the reference's arrays under `prefix`."""
    out = {}
    for name, array in arrays.items():
        if name.startswith(prefix):
            ours = name.removeprefix(prefix)
            for pattern, replacement in RENAMES:
                ours = re.sub(pattern, replacement, ours)
            out[ours] = array
    return out


def nested(flat):
    tree = flax.traverse_util.unflatten_dict(flat, sep="/")
    return jax.tree.map(jnp.asarray, tree)


def flattened(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def moves_by_rounding_alone(name):
    """True gradients of zero: a key's bias shifts all of a query's logits alike, and a bias along
    the tokens is the same in every channel, which the norms after it take out."""
    return name.endswith(("key/bias", "token_mixing/dense2/bias"))


# test_goldens.py has the steps of every optimizer of Big Vision, also those of Adafactor.
ADAFACTOR = pytest.param("trajectory_i21k_adafactor_sigmoid", marks=pytest.mark.soak)


@pytest.mark.parametrize("case", ["trajectory_s16_recipe_bf16mu", ADAFACTOR])
def test_thirty_steps_of_big_vision(golden, make, case):
    facts, io = golden("big_vision", case, "_io")
    _, start = golden("big_vision", case, "_init")
    _, end = golden("big_vision", case, "_final")
    params = nested(renamed(start))
    model = _big_vision_model(facts)
    optimizer = _big_vision_optimizer(facts, params, make, *BIG_VISION[case])
    losses = {"softmax_xent": optax.softmax_cross_entropy, "sigmoid_xent": _sigmoid}

    def train_step(params, state, step, batch):
        images, labels, weight = batch
        images = weight * images + (1 - weight) * jnp.roll(images, 1, axis=0)
        targets = jax.nn.one_hot(labels, facts["num_classes"])
        targets = weight * targets + (1 - weight) * jnp.roll(targets, 1, axis=0)

        def mean_loss(params):
            logits = model.apply({"params": params}, images, train=True)
            return losses[facts["loss"]](logits, targets).mean()

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state, params, step)
        return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads)

    state = jax.jit(optimizer.init)(params)
    train_step = jax.jit(train_step, donate_argnums=(0, 1))
    logged = []
    for step in range(facts["steps"]):
        index = step % facts["num_batches"]
        batch = io["images"][index], io["labels"][index], io["mixup_weight"][step]
        params, state, *row = train_step(params, state, step, batch)
        logged.append(row)
    ours = np.asarray(logged)
    np.testing.assert_allclose(ours[:, 0], io["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours[:, 1], io["grad_norm"], rtol=1e-4)
    expected = renamed(end)
    for name, value in flattened(params).items():
        if not moves_by_rounding_alone(name):
            sampled.assert_close(value, expected[name], atol=ONE_FLIP, err_msg=name)


def _sigmoid(logits, targets):
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


def _big_vision_model(facts):
    spec = facts["model"]
    backbone = VisionTransformer(
        **{key: spec[key] for key in ("patch_size", "width", "depth", "mlp_dim", "num_heads")},
        pooling=POOLING[spec["pool_type"]],
        position=POSITION[spec["posemb"]],
        scan=spec.get("scan", False),
    )
    hidden = spec["width"] if spec.get("rep_size") else None
    return Classifier(backbone, facts["num_classes"], representation_size=hidden)


def _big_vision_optimizer(facts, params, make, name, args):
    recorded = facts["optimizer"]
    words = {"decay_type": "name", "warmup_steps": "warmup", "cooldown_steps": "cooldown"}
    return make(
        params,
        facts["total_steps"],
        name=name,
        args=args,
        lr=recorded["lr"],
        weight_decay=recorded["wd"],
        decay_coupling="schedule",
        clip_norm=recorded["grad_clip_norm"],
        schedule={words.get(key, key): value for key, value in recorded["schedule"].items()},
    )


@pytest.mark.parametrize(
    "case",
    [
        # The gradients of these models are among the goldens of tests/models.
        pytest.param("steps_vit_token_accum1", marks=pytest.mark.soak),
        pytest.param("steps_vit_gap_accum4", marks=pytest.mark.soak),
        "steps_mixer_accum2",
    ],
)
def test_update_steps_of_vision_transformer(golden, make, case):
    facts, arrays = golden("vision_transformer", case, ".io", ".params")
    recorded = {"grad0/", "final/"}
    io = {name: array for name, array in arrays.items() if name in {"images", "labels", "loss"}}
    start = {
        name: array
        for name, array in arrays.items()
        if name not in {*io, "loss0_full_batch"} and not name.startswith(tuple(recorded))
    }
    params, model = nested(renamed(start)), _vision_transformer_model(facts)
    optimizer = _vision_transformer_optimizer(facts, params, make)

    def train_step(params, state, step, images, labels):
        def mean_loss(params):
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state, params, step)
        return optax.apply_updates(params, updates), state, loss, grads

    def assert_equals_recorded(tree, prefix):
        expected = renamed(arrays, prefix)
        for name, value in flattened(tree).items():
            if not moves_by_rounding_alone(name):
                atol = 1e-4 * np.abs(sampled.values(expected[name])).max() + 1e-6
                sampled.assert_close(value, expected[name], atol=atol, err_msg=name)

    state, losses = jax.jit(optimizer.init)(params), []
    train_step = jax.jit(train_step)
    for step in range(facts["steps"]):
        params, state, loss, grads = train_step(
            params, state, step, io["images"][step], io["labels"][step]
        )
        losses.append(loss)
        if step == 0:
            assert_equals_recorded(grads, "grad0/")
    np.testing.assert_allclose(losses, io["loss"], rtol=0, atol=1e-4 * io["loss"].max())
    assert_equals_recorded(params, "final/")


def _vision_transformer_model(facts):
    config = facts["config"]
    if facts["model"] == "MlpMixer":
        sizes = ("tokens_mlp_dim", "channels_mlp_dim")
        backbone = Mixer(
            patch_size=config["patches"]["size"],
            width=config["hidden_dim"],
            depth=config["num_blocks"],
            **{key: config[key] for key in sizes},
            scan=False,
        )
        return Classifier(backbone, facts["num_classes"])
    backbone = VisionTransformer(
        patch_size=config["patches"]["size"],
        width=config["hidden_size"],
        depth=config["transformer"]["num_layers"],
        num_heads=config["transformer"]["num_heads"],
        mlp_dim=config["transformer"]["mlp_dim"],
        pooling=POOLING[config["classifier"]],
        scan=False,
    )
    return Classifier(backbone, facts["num_classes"])


def _vision_transformer_optimizer(facts, params, make):
    schedule = facts["schedule"]
    spec = {"name": schedule["decay_type"], "warmup": schedule["warmup_steps"]}
    if spec["name"] == "linear":
        spec["end"] = 1e-5 / schedule["base_lr"]
    return make(
        params,
        schedule["total_steps"],
        name="sgd",
        args={"momentum": facts["momentum"], "momentum_dtype": facts["accumulator_dtype"]},
        lr=schedule["base_lr"],
        clip_norm=facts["clip_global_norm"],
        schedule=spec,
    )
