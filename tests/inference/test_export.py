"""Programs for other runtimes: written, run there on a photograph, compared with the model."""

import functools
import importlib.util
import types

import jax
import numpy as np
import pytest

import vit_jax
from vit_jax import tasks
from vit_jax.checkpoints.input_spec import InputSpec
from vit_jax.errors import UserError, WrongExport
from vit_jax.inference import export as export_lib
from vit_jax.inference import program as program_lib
from vit_jax.inference.exports import Format
from vit_jax.inference.predict import Predictor
from vit_jax.inference.preparation import ByInputSpec
from vit_jax.types import ArraySpec, DataInfo

MODEL = {"name": "vit", "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2}
TASKS = {
    "classification": {"name": "classification"},
    "adapted": {"name": "classification", "lora": {"rank": 2}},
    "segmentation": {"name": "segmentation"},
    "detection": {"name": "detection"},
    "contrastive": {
        "name": "contrastive",
        "dim": 8,
        "text": {"width": 16, "depth": 1, "num_heads": 2, "vocab_size": 300},
    },
}
IMAGE = ArraySpec((32, 32, 3), np.dtype(np.uint8))
INT = np.dtype(np.int32)
SPECS = {
    "classification": {"image": IMAGE, "label": ArraySpec((), INT)},
    "adapted": {"image": IMAGE, "label": ArraySpec((), INT)},
    "segmentation": {"image": IMAGE, "segmentation": ArraySpec((32, 32, 1), np.dtype(np.uint8))},
    "detection": {
        "image": IMAGE,
        "boxes": ArraySpec((3, 4), np.dtype(np.float32)),
        "box_label": ArraySpec((3,), INT),
    },
    "contrastive": {"image": IMAGE, "tokens": ArraySpec((6,), INT)},
}


@functools.cache
def predictor_of(name):
    """An untrained predictor whose parameters are all random, so that its outputs differ."""
    return predictor_for(MODEL, name)


def predictor_for(model, name="classification"):
    """The predictor of a task with a model of the given fields."""
    info = DataInfo(SPECS[name], 3, ("a", "b", "c"))
    task = tasks.build(TASKS[name], model, info)
    rng = np.random.default_rng(0)  # Nothing is compiled for these parameters.
    params = jax.tree.map(
        lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), tasks.abstract_params(task)
    )
    params = task.inference_params(params)  # Without adapters.
    return Predictor(task, params, info, ByInputSpec(InputSpec(size=(32, 32)), 3))


CASES = {
    "logits": ("classification", {}, {"logits": (3,)}),
    "probabilities": (
        "classification",
        {"include_preprocessing": True, "weights": "bfloat16", "batch": 2},
        {"probability": (3,)},
    ),
    "adapters": ("adapted", {}, {"logits": (3,)}),
    "embedding": ("classification", {"outputs": "features"}, {"features": (16,)}),
    "pixels": ("segmentation", {}, {"logits": (32, 32, 3)}),
    "boxes": (
        "detection",
        {"include_preprocessing": True},
        {"detected_boxes": None, "detected_score": None, "detected_label": None},
    ),
    "image vectors": ("contrastive", {}, {"image_vector": (8,)}),
    "text vectors": ("contrastive", {"outputs": "text", "batch": 2}, {"text_vector": (8,)}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_program_takes_any_number_of_rows(case):
    name, options, outputs = CASES[case]
    program = program_lib.build(predictor_of(name), **options)
    assert program.outputs.keys() == outputs.keys()
    for output, shape in outputs.items():
        found = program.outputs[output].shape
        assert found[0] == program.input.shape[0]
        assert shape is None or found[1:] == shape
    assert program.batch == options.get("batch")
    towers = {weight.partition("/")[0] for weight in program.weights}
    assert ("backbone" in towers) == ("text_vector" not in outputs)
    assert ("text" in towers) == ("text_vector" in outputs)


LONG = pytest.mark.soak


@pytest.mark.parametrize(
    "case",
    [
        case if case in ("probabilities", "text vectors") else pytest.param(case, marks=LONG)
        for case in CASES
    ],
)
def test_what_was_written_answers_as_the_model_and_says_how_to_load_it(case, tmp_path, monkeypatch):
    name, options, outputs = CASES[case]
    done = vit_jax.export(predictor_of(name), str(tmp_path / "out"), "stablehlo", **options)
    assert done.difference <= export_lib.TOLERANCE
    assert done.size > 1000
    assert done.seconds > 0
    stored = jax.export.deserialize((tmp_path / "out/program.stablehlo").read_bytes())
    assert stored.platforms == ("cpu", "cuda", "tpu")
    readme = (tmp_path / "out/README.md").read_text()
    assert all(f"`{output}`" in readme for output in outputs)
    *_, argument = stored.in_avals
    assert ("mean [127.5]" in readme) == (argument.dtype == np.float32)
    monkeypatch.chdir(tmp_path / "out")
    shape = (options.get("batch", 5), *argument.shape[1:])
    names = {("tokens" if "text" in case else "images"): np.zeros(shape, argument.dtype)}
    exec(readme.split("```")[1].removeprefix("python\n"), names)
    assert {name: len(value) for name, value in names["outputs"].items()} == {
        output: shape[0] for output in outputs
    }


def test_the_readme_lists_the_classes_of_the_task_as_they_are():
    info = types.SimpleNamespace(class_names=None)
    task = types.SimpleNamespace(class_names=("<b>", "a`b\n# c"), info=info)
    program = types.SimpleNamespace(
        batch=1, input=np.zeros((1, 8)), outputs={}, name="tokens", meaning="numbers"
    )
    fmt = Format("A format", None, None, "")
    readme = export_lib._readme(types.SimpleNamespace(task=task, info=info), program, fmt)
    assert readme.endswith("\n\n## Classes\n\n0. `<b>`\n1. `a'b # c`\n")


OTHER_FAMILIES = {
    "Mixer": {"name": "mixer_b16", "patch_size": 8, "width": 16, "depth": 2,
              "tokens_mlp_dim": 8, "channels_mlp_dim": 24},
    "hybrid": {"name": "r50_b16", "patch_size": 1, "width": 16, "depth": 1, "num_heads": 2,
               "mlp_dim": 24, "stages": (1, 1), "width_factor": 0.5},
    "BiT": {"name": "bit_r50x1", "stages": (1, 1), "width_factor": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("to", ["stablehlo", pytest.param("savedmodel", marks=LONG)])
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_a_model_of_another_family_answers_as_the_model(family, to, tmp_path):
    done = vit_jax.export(predictor_for(OTHER_FAMILIES[family]), str(tmp_path / "out"), to)
    assert done.difference <= 1e-5
    assert done.size > done.model_size


def test_a_saved_model_answers_as_the_model(tmp_path):
    done = vit_jax.export(predictor_of("classification"), str(tmp_path / "out"), "savedmodel")
    assert done.difference <= export_lib.TOLERANCE
    assert (tmp_path / "out/saved_model.pb").exists()


@pytest.mark.parametrize(
    ("answer", "said"),
    [(lambda value: 1.001 * value, r"1\.0e-03"), (lambda value: np.nan * value, "nan")],
)
def test_an_export_that_answers_otherwise_is_refused_and_leaves_nothing(
    tmp_path, monkeypatch, answer, said
):
    def write(program, folder):
        (folder / "program").touch()
        written.append(program)

    def run(inputs):
        return {name: answer(value) for name, value in written[0](inputs).items()}

    written = []
    wrong = Format("A format", write, lambda folder: run, "")
    monkeypatch.setattr(export_lib, "FORMATS", types.SimpleNamespace(find=lambda *_: wrong))
    with pytest.raises(WrongExport, match=f"A format: output logits differs .* by {said}"):
        vit_jax.export(predictor_of("classification"), str(tmp_path / "out"))
    assert len(written) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "missing", "message"),
    [
        ("savedmodel", "tensorflow", "^to=savedmodel: tensorflow is not .* the extra 'export' of"),
        ("onnx", "onnxruntime", "^to=onnx: onnxruntime is not .* the extra 'onnx' of vit-jax"),
    ],
)
def test_a_format_names_the_extra_that_it_needs(to, missing, message, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == missing else find(name, *of)
    )
    with pytest.raises(UserError, match=message):
        vit_jax.export("never read", str(tmp_path / "out"), to)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("out", "tflite"), {}, r"is no export format; valid: onnx, savedmodel, stablehlo"),
        (("out", "savedmodl"), {}, r"^to='savedmodl' is no .*; did you mean 'savedmodel'"),
        (("out",), {"outputs": "feature"}, "^outputs=feature.* did you mean 'features'"),
        (("out",), {"weights": "bf16"}, "did you mean 'bfloat16'"),
        (("no/such/out",), {}, "there is no folder"),
        ((".",), {}, "exists already"),
        (("out",), {"outputs": "text"}, "is for runs that learned images and texts"),
        (("out", None), {}, "^to=None: write the name of an export format"),
        (("out",), {"batch": 0}, "^batch=0: write a positive whole number"),
        (("out",), {"batch": 1.5}, "^batch=1.5: write a positive whole number"),
        (("out",), {"images": 3}, "images=3: write a list of image files"),
        (("gs://bucket/out",), {}, "name a folder on this machine"),
        (("/proc/out",), {}, "cannot write '/proc/out': "),  # As a folder that is read-only.
        (("a" * 250,), {}, "File name too long"),
        (("a\0b",), {}, r"cannot write 'a\\x00b': "),
        ((None,), {}, "path=None: write a path"),
    ],
)
def test_what_cannot_be_exported_is_one_line(arguments, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        vit_jax.export(predictor_of("classification"), *arguments, **options)
    assert list(tmp_path.iterdir()) == []
