"""Programs in ONNX Runtime answer as the models do, in each family of models and for each task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_export import CASES, OTHER_FAMILIES, predictor_for, predictor_of

import vit_jax
from vit_jax.errors import UserError, WrongExport
from vit_jax.inference import agreement as agreement_lib
from vit_jax.inference import export as export_lib
from vit_jax.inference import program as program_lib
from vit_jax.inference.agreement import Agreement
from vit_jax.inference.exports import onnx as onnx_format
from vit_jax.inference.program import Program

FAMILIES = {
    "ViT": {"name": "vit", "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2,
            "num_registers": 2, "layer_scale": 0.1, "qk_norm": True, "mlp": "swiglu"},
    "RoPE": {"name": "vit", "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2,
             "position": "rope", "pooling": "map", "activation": "gelu"},
    **OTHER_FAMILIES,
}  # fmt: skip
PROGRAMS = {
    **{name: CASES[name][:2] for name in ("text vectors", "probabilities")},
    **{name: (name, {}) for name in FAMILIES},
    "int8": ("ViT", {"weights": "int8", "include_preprocessing": True}),
    "one row": ("Mixer", {"weights": "bfloat16", "batch": 1, "outputs": "features"}),
    "segmentation": ("segmentation", {"include_preprocessing": True}),
    "detection": ("detection", {"include_preprocessing": True}),
    "images of two towers": ("contrastive", {}),
}


def written(program, folder):
    """Returns a function that runs a program in ONNX Runtime."""
    onnx_format.FORMAT.write(program, folder)
    return onnx_format.FORMAT.open(folder)


# The programs of the first two are compiled by other tests, too.
SOON = ("text vectors", "probabilities", "BiT")


@pytest.mark.parametrize(
    "case",
    [case if case in SOON else pytest.param(case, marks=pytest.mark.soak) for case in PROGRAMS],
)
def test_a_program_answers_as_the_model(case, tmp_path):
    name, options = PROGRAMS[case]
    predictor = predictor_for(FAMILIES[name]) if name in FAMILIES else predictor_of(name)
    program = program_lib.build(predictor, **options)
    run, rng = written(program, tmp_path), np.random.default_rng(0)
    shape = (program.batch or 3, *program.input.shape[1:])
    inputs = rng.integers(0, 256, shape).astype(program.input.dtype)
    inputs = inputs / np.float32(128) - 1 if inputs.dtype == np.float32 else inputs
    expected, found = program(inputs), run(inputs)
    assert found.keys() == expected.keys()
    for output, value in expected.items():
        assert found[output].dtype == value.dtype
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[output], value, rtol=0, atol=1e-5 * scale)


def test_an_export_is_checked_and_says_what_int8_costs(tmp_path):
    done = vit_jax.export(
        predictor_of("classification"), str(tmp_path / "out"), "onnx", weights="int8"
    )
    assert done.difference <= 1e-5
    assert 1e-4 < done.rounding < 0.05
    assert done.limit == export_lib.ROUNDING["int8"]
    assert "(the model in JAX: " in str(done)
    assert "onnxruntime.InferenceSession" in (tmp_path / "out/README.md").read_text()


def test_an_operation_that_onnx_lacks_is_named(tmp_path):
    def function(weights, images):
        return {"out": jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, images)}

    program = Program(function, {}, "images", jax.ShapeDtypeStruct((2, 3), jnp.float32), "")
    with pytest.raises(UserError, match="operation 'while' has no counterpart there; export it to"):
        onnx_format.FORMAT.write(program, tmp_path)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.cumsum(x, 1) % 3,
        lambda x: x[:, ::-1] + jnp.arange(4.0)[None, :, None],
        lambda x: jnp.where(x > 0, x, -x).clip(0.1, 0.5),
        lambda x: jnp.argmax(x, 1).astype(jnp.float32),
        lambda x: jnp.take_along_axis(x[..., 0], jnp.argmax(x[..., 0], 1)[:, None], 1),
        lambda x: jnp.concatenate([x[1:], x[:1]]),  # A size that depends on the rows.
        lambda x: jnp.einsum("bij,bkj->bik", x, x) ** 3,
        lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)), constant_values=7.0),
        lambda x: jax.lax.scan(lambda c, r: (c + r, c * r), x[:, 0], jnp.ones((3, 1, 5)))[1],
        lambda x: jnp.broadcast_to(jnp.ones((1, 1, 5)), x.shape).sum(1),
        lambda x: ((x > 0) & ~(x > 1)).any(1).astype(jnp.float32),
        lambda x: 1e7 * jnp.log1p(jnp.stack([1e-7 * x.clip(-1, 1), 1e-3 * jnp.exp(x)])),
    ],
)  # fmt: skip
def test_operations_answer_as_in_jax(function, tmp_path):
    (rows,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((rows, 4, 5), jnp.float32)
    program = Program(lambda _, x: {"out": function(x)}, {}, "images", shape, "")
    run = written(program, tmp_path)
    inputs = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    with jax.disable_jit():
        expected = np.asarray(function(jnp.asarray(inputs)))
    np.testing.assert_allclose(run(inputs)["out"], expected, rtol=1e-6, atol=1e-6)


def test_rounded_weights_agree_on_a_split_or_are_refused(tiny_config, digits_npz):
    config = tiny_config(data__name=str(digits_npz), eval__sets__val__split="train[:60]")
    task = predictor_of("classification").task
    shape = jax.ShapeDtypeStruct((7, 8, 8, 1), jnp.uint8)
    model = Program(lambda _, x: {"logits": 1.0 * x[:, :2, 0, 0]}, {}, "images", shape, "")
    pixels = np.load(digits_npz)["image"][:60].astype(int)

    def other(inputs):
        return {"logits": model(inputs)["logits"] - [0, 1]}

    same = agreement_lib.of_first_split(config, task, model, model, model)
    assert (same.same, same.total, same.split) == (60, 60, "val")
    found = agreement_lib.of_first_split(config, task, other, model, model)
    assert found.total - found.same == (pixels[:, 1, 0, 0] - pixels[:, 0, 0, 0] == 1).sum()
    export_lib.check_agreement(Agreement(99, 100, "val"))
    with pytest.raises(WrongExport, match=r"98 of 100 images of 'val' \(98\.00%\), less than 99%"):
        export_lib.check_agreement(Agreement(98, 100, "val"))
