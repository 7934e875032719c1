"""Images with texts: LiT's towers, retrieval counted by hand, zero-shot, the whole way of a run."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import checkpoints, models, tasks
from vit_jax import config as config_lib
from vit_jax.data.tokenizer import open_tokenizer
from vit_jax.errors import UserError
from vit_jax.inference import convert
from vit_jax.inference.predict import Predictor
from vit_jax.tasks import _retrieval
from vit_jax.training import evaluate
from vit_jax.training.loop import train
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec, DataInfo

GOLDEN = Path(__file__).parents[1] / "golden/vision_transformer"
TINY = {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4}
LENGTH, PROMPTS = 6, ("a {}", "{}!")
FIELDS = {
    "name": "contrastive",
    "dim": 8,
    "vocab": "bytes",
    "text": {"width": 8, "depth": 1, "num_heads": 1, "pooling": "mean"},
    "scale": 5.0,
}


def info(length=LENGTH, side=8, channels=1, vocab=""):
    image = ArraySpec((side, side, channels), np.dtype("uint8"))
    tokens = ArraySpec((length,), np.dtype("int32"), vocab)
    return DataInfo({"image": image, "tokens": tokens}, 0)


def split_of(images, texts, tokens):
    """A split of unit vectors, from lists; tokens are numbers, -1 for no text."""
    tokens = np.array(tokens)[..., None]
    return _retrieval.Split.of(np.array(images, float), np.array(texts, float), tokens)


def test_each_text_counts_once_and_each_of_an_image_is_right():
    split = split_of(
        images=[[1, 0], [0, 1], [0.6, 0.8]],
        texts=[[[0.6, 0.8], [1, 0]], [[0, 1], [0, 0]], [[0.6, 0.8], [0, 0]]],
        tokens=[[7, 8], [9, -1], [7, -1]],
    )
    np.testing.assert_array_equal(split.own, [[0, 1], [2, -1], [0, -1]])
    assert split.texts.shape == (3, 2)
    found = _retrieval.recalls(split)
    assert found["image_to_text_recall1"] == found["text_to_image_recall1"] == 1


def test_recall_by_hand_and_equals_count_as_wrong():
    images = np.eye(12)
    order = np.roll(np.arange(12), 1)
    # The right text of image i is text i; the nearest is another for all but the last three.
    texts = np.eye(12)[order] + 0.5 * np.eye(12)
    texts[10:] = np.eye(12)[10:] * 3
    split = split_of(images, texts[:, None], np.arange(12)[:, None])
    found = _retrieval.recalls(split)
    assert found["image_to_text_recall1"] == pytest.approx(3 / 12)
    assert found["image_to_text_recall5"] == 1
    alike = split_of(np.ones((12, 1)), np.ones((12, 1, 1)), np.arange(12)[:, None])
    assert set(_retrieval.recalls(alike).values()) == {0.0}
    assert _retrieval.right_among(alike, 5) == 0


def test_the_right_text_among_others_by_hand():
    rng = np.random.default_rng(0)
    images, vectors = rng.normal(size=(30, 3)), rng.normal(size=(20, 3))
    numbers = rng.integers(0, 20, 30)
    numbers[:20] = np.arange(20)
    split = split_of(images, vectors[numbers][:, None], numbers[:, None])
    right = 0
    for i in range(30):
        texts = dict.fromkeys(numbers[(i + np.arange(30)) % 30])
        first, *others = (images[i] @ vectors[number] for number in list(texts)[:6])
        right += first > max(others)
    assert _retrieval.right_among(split, 6) == pytest.approx(right / 30)
    assert 0 < right < 30
    assert _retrieval.right_among(split, 20) is None


def test_images_without_texts_are_no_queries_and_no_answers(monkeypatch):
    """Texts may be missing at any place, of some images or of all."""
    rng = np.random.default_rng(3)
    images, vectors = rng.normal(size=(24, 4)), rng.normal(size=(24, 2, 4))
    tokens = np.arange(48).reshape(24, 2)
    tokens[::3] = -1
    tokens[1::3, 0] = -1
    found = split_of(images, vectors, tokens)
    kept = np.arange(24) % 3 > 0
    whole = split_of(images[kept], vectors[kept], tokens[kept])
    assert _retrieval.right_among(found, 5) == _retrieval.right_among(whole, 5)
    first = np.where(tokens[:, 0] < 0, 1, 0)[kept]
    np.testing.assert_array_equal(whole.texts[whole.own[:, 0]], vectors[kept][np.arange(16), first])

    scores = images @ found.texts.T
    owner = np.array([np.flatnonzero((found.own == text).any(1))[0] for text in range(24)])
    for_images = [
        min((scores[i] > scores[i, text]).sum() for text in np.flatnonzero(owner == i))
        for i in np.flatnonzero(kept)
    ]
    for_texts = [(scores[:, text] > scores[owner[text], text]).sum() for text in range(24)]
    recalls = _retrieval.recalls(found)
    monkeypatch.setattr(_retrieval, "_ROWS_AT_ONCE", 5)
    assert _retrieval.recalls(found) == recalls
    for cutoff in (1, 5, 10):
        expected = np.mean(np.array(for_images) < cutoff), np.mean(np.array(for_texts) < cutoff)
        for name, share in zip(("image_to_text", "text_to_image"), expected, strict=True):
            assert recalls[f"{name}_recall{cutoff}"] == pytest.approx(share)

    without = split_of(images, vectors, np.full((24, 2), -1))
    assert _retrieval.recalls(without) == {}
    assert _retrieval.right_among(without, 2) is None


def test_vectors_that_are_no_numbers_find_nothing():
    images = np.full((12, 3), np.nan)
    split = split_of(images, np.eye(12)[:, None, :3], np.arange(12)[:, None])
    assert set(_retrieval.recalls(split).values()) == {0.0}
    assert _retrieval.right_among(split, 5) == 0


def lit(case_text, **fields):
    """(task with the towers of a stored LiT model, its file, inputs and outputs)."""
    io = dict(np.load(GOLDEN / f"lit_{case_text}.io.npz"))
    dims = json.loads((GOLDEN / f"lit_{case_text}.json").read_text())["config"]["out_dim"]
    sizes = {"width": 32, "depth": 2, "num_heads": 4, "mlp_dim": 64}
    image = {"name": "vit", **sizes, "patch_size": 8, "pooling": "token"}
    text = dict(sizes)
    if case_text == "bert":
        text |= {"name": "bert_base", "vocab_size": 90, "max_length": 16}
    else:
        text |= {"name": "text", "vocab_size": 120}
    keys = {"name": "contrastive", "text": text, "dim": dims[1], "project_image": bool(dims[0])}
    task = tasks.build(keys | fields, image, info(io["tokens"].shape[1], 32, 3))
    return task, GOLDEN / f"lit_{case_text}.params.npz", io


@pytest.mark.parametrize("text", ["bert", "texttransformer"])
def test_released_towers_find_what_they_found_and_are_written_as_they_were(text, tmp_path):
    task, path, io = lit(text)
    params, report = checkpoints.load_with_report(path, task.model, image_size=32)
    assert not report.initialised
    assert not report.ignored
    pairs = jax.jit(task.model.apply)({"params": params}, io.get("images"), io["tokens"])
    theirs = io["out/txt/logits"]
    theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(pairs.text, theirs, atol=2e-6)
    np.testing.assert_allclose(pairs.scale, np.exp(np.load(path)["t"][0]), rtol=1e-6)
    if "images" in io:
        logits = pairs.logits(pairs.image, pairs.text)
        np.testing.assert_allclose(logits.T, io["similarity"], atol=3e-5)
    said = checkpoints.save(params, task.model, tmp_path / "lit.npz", "npz")
    model, dims = {"bert": ("bert", (24, 24))}.get(text, ("text_transformer", (None, 32)))
    assert f"text_model={model!r}, out_dim={dims}" in said
    theirs, ours = dict(np.load(path)), dict(np.load(tmp_path / "lit.npz"))
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name, strict=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, running_on_one_device):
    """(workdir, outcome) of a run as LiT's: a frozen image tower from a file, a new text tower."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(__file__.rsplit("/", 1)[0])
    folder = tmp_path_factory.mktemp("run")
    image = models.build(**TINY)
    params = jax.jit(image.init)(jax.random.key(7), np.zeros((1, 8, 8, 1), np.float32))["params"]
    checkpoints.save(params, image, folder / "image", "orbax")
    config = config_lib.default_config()
    config.total = 60
    config.batch_size = 32
    config.model = dict(TINY)
    config.task = {**FIELDS, "classes": tuple("0123456789"), "prompts": PROMPTS, "candidates": 5}
    config.data.source = "captioned:Source"
    config.data.name = ""
    config.eval.sets = {"val": {"split": "val"}}
    config.eval.every = config.log.every = config.checkpoint.every = 60
    config.init.checkpoint = str(folder / "image")
    config.optim.lr = 2e-2
    config.optim.freeze = ["backbone/.*"]
    config.log.tensorboard = config.log.pictures = False
    config.compilation_cache = ""
    workdir = str(folder / "workdir")
    with running_on_one_device():
        outcome = train(config_lib.validate(config), workdir)
    yield workdir, outcome
    patch.undo()


def test_a_run_learns_and_its_evaluation_does_not_depend_on_batches(run):
    workdir, outcome = run
    results = outcome.results
    assert outcome.headline[0] == "val/image_to_text_recall1"
    assert results["val/num_examples"] == 20
    assert results["val/accuracy"] > 0.25
    assert results["val/caption_among_5"] > 0.4
    again = evaluate.evaluate_workdir(Workdir.existing(workdir), {"eval.batch_size": "8"})
    assert again == pytest.approx(results)


def test_the_frozen_tower_is_that_of_the_file(run):
    workdir, _ = run
    image = models.build(**TINY)
    before = checkpoints.load(f"{Path(workdir).parent}/image", image, image_size=8)
    params = Predictor.from_workdir(workdir).params
    jax.tree.map(np.testing.assert_array_equal, dict(params["backbone"]), before)
    alone, report = checkpoints.load_with_report(workdir, image, image_size=8)
    jax.tree.map(np.testing.assert_array_equal, dict(alone), before)
    left = {line.partition(": ")[0].partition("/")[0] for line in report.ignored}
    assert left == {"text", "text_proj", "image_proj", "log_scale"}
    # And whole, into a model that is stacked otherwise.
    task = tasks.build(
        {**FIELDS, "text": {**FIELDS["text"], "scan": False}}, {**TINY, "scan": False}, info()
    )
    loaded, report = checkpoints.load_with_report(workdir, task.model, image_size=8)
    assert not report.initialised
    np.testing.assert_array_equal(loaded["text"]["pos_embed"], params["text"]["pos_embed"])
    kernel = params["text"]["blocks"]["mlp"]["dense1"]["kernel"][0]
    np.testing.assert_array_equal(loaded["text"]["blocks_0"]["mlp"]["dense1"]["kernel"], kernel)


@pytest.mark.soak
def test_a_frozen_text_tower_stays_as_it_was_and_the_run_resumes_exactly(
    run, tmp_path, running_on_one_device, monkeypatch
):
    """Steps of training change the image tower and the projections alone, also after a cut."""
    monkeypatch.syspath_prepend(__file__.rsplit("/", 1)[0])
    start = Workdir.existing(run[0])
    config = start.read_config().copy_and_resolve_references()
    config.unlock()
    config.init.checkpoint, config.optim.freeze = run[0], ["text/.*"]
    config.total, config.checkpoint.every = 4, 2
    config.eval.every = config.log.every = 4
    with running_on_one_device():
        train(config_lib.validate(config), str(tmp_path))
        before = checkpoints.loading.read_weights(start.path).arrays
        first = checkpoints.loading.read_weights(tmp_path / "checkpoints/4").arrays
        shutil.rmtree(tmp_path / "checkpoints/4")
        train(config_lib.validate(config), str(tmp_path))
    second = checkpoints.loading.read_weights(tmp_path / "checkpoints/4").arrays
    jax.tree.map(np.testing.assert_array_equal, first, second)
    same = {name for name, array in before.items() if np.array_equal(array, second[name])}
    assert same == {name for name in before if name.startswith("text/")}


def test_a_run_answers_which_text_fits(run):
    workdir, _ = run
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    predictor = Predictor.from_workdir(workdir, texts=["a 3", "a 7, of course"])
    outputs = predictor.predict(images)
    np.testing.assert_allclose(outputs["probability"].sum(1), 1, rtol=1e-6)
    lines = predictor.task.result_lines(outputs, 1)
    assert [len(one) for one in lines] == [1, 1]
    assert lines[0][0].split("  ")[-1] in ("a 3", "a 7, of course")


def test_a_run_is_exported_with_both_towers(run, tmp_path):
    workdir, _ = run
    with pytest.raises(UserError, match=r"npz has no place for mean pooling.*--to=big_vision or"):
        convert.run(workdir, str(tmp_path / "c.npz"), "npz")
    said = convert.run(workdir, str(tmp_path / "c.npz"), "big_vision")
    assert "two_towers" in said
    stored, params = np.load(tmp_path / "c.npz"), Predictor.from_workdir(workdir).params
    np.testing.assert_array_equal(stored["params/t"], params["log_scale"])
    convert.run(workdir, str(tmp_path / "own"), "orbax")
    model = tasks.build(FIELDS, TINY, info()).model
    read = {name: checkpoints.load(tmp_path / name, model) for name in ("c.npz", "own")}
    jax.tree.map(np.testing.assert_array_equal, dict(read["own"]), dict(params))
    assert read["c.npz"].keys() == params.keys()
    for part in params.keys() - {"backbone"}:  # There the class token's position moved into it.
        jax.tree.map(np.testing.assert_array_equal, read["c.npz"][part], params[part])


def test_a_task_with_adapters_keeps_them_when_it_answers():
    task = tasks.build({**FIELDS, "lora": {"rank": 2}}, TINY, info())
    with pytest.raises(UserError, match="an empty text"):
        task.with_texts(["a 3", ""])
    adapted = task.with_texts(["a 3", "a 7"])
    assert adapted.rank == 2
    assert adapted.classes == ("a 3", "a 7")


def test_class_names_are_averaged_over_prompts_and_pictures_have_captions(run):
    predictor = Predictor.from_workdir(run[0])
    task, params = predictor.task, predictor.params
    found = jax.jit(task.precompute)(params)["class_vectors"]
    tokens = open_tokenizer("bytes", LENGTH).encode(["a 0", "0!", "a 1", "1!"])
    images = np.zeros((4, 8, 8, 1), np.uint8)
    said = jax.device_get(jax.jit(task.predict)(params, {"image": images, "tokens": tokens}))
    vectors = said["text_vector"].reshape(2, 2, -1).mean(1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(found[:2], vectors, rtol=1e-4, atol=1e-6)
    examples = {"image": images, "tokens": tokens, **said}
    assert set(task.summaries(examples)) <= {"a 0", "0!", "a 1", "1!"}
    (section,) = task.sections(examples)
    assert section.title == "Captions beside the truth"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "hinge"}, "loss='hinge': write softmax or sigmoid"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"vocab": "none.txt"}, "none.txt': no such file"),
        ({"vocab": "", "classes": ("3",)}, "set config.task.vocab too"),
        ({"prompts": ("a 3",)}, "'a 3' has no {}"),
        ({"classes": ("a 3", "")}, "an empty text: write words in each --text, or in config.task"),
        ({"text": {"name": "vit_ti16"}}, "text.name='vit_ti16' reads no texts"),
        ({"text": {"widht": 8}}, "did you mean 'width'"),
        ({"dim": 9, "project_image": False}, "image tower's vectors have 8 numbers"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(fields, message):
    with pytest.raises(UserError, match=message):
        tasks.build({**FIELDS, **fields}, TINY, info())


def test_the_vocabulary_is_that_of_the_tokens():
    task = tasks.build({**FIELDS, "vocab": ""}, TINY, info(vocab="bytes"))
    assert task.vocab == "bytes"
    assert task.model.text.vocab_size == open_tokenizer("bytes", LENGTH).vocab_size
    assert tasks.build(FIELDS, TINY, info(vocab="bytes")).vocab == "bytes"
    message = r"config.task.vocab='words.txt', but config.data.pp tokenizes with 'bytes'"
    with pytest.raises(UserError, match=message):
        tasks.build({**FIELDS, "vocab": "words.txt"}, TINY, info(vocab="bytes"))


def test_data_without_tokens_is_named(scene_info):
    with pytest.raises(UserError, match=r"it wants.*tokens.*gives \{'image'"):
        tasks.build(FIELDS, TINY, scene_info(10, "image"))
    with pytest.raises(UserError, match="needs tokens"):
        tasks.build(FIELDS, TINY, info()).metrics({"examples": 3})
    with pytest.raises(UserError, match="write --text=TEXT once for each"):
        tasks.build(FIELDS, TINY, info()).result_lines({"image_vector": np.ones((1, 8))}, 5)
