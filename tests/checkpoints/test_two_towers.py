"""Image-text models of transformers and open_clip, against what those libraries computed.

Texts, tokens, vectors and logits were recorded by `record_hf.py` with each library's own tokenizer.
"""

import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import checkpoints, models, tasks
from vit_jax.__main__ import main
from vit_jax.checkpoints import array_files, files, loading
from vit_jax.checkpoints.fit.inference import infer_towers
from vit_jax.checkpoints.formats import _timm_export
from vit_jax.checkpoints.weights import CLS, PATCHES
from vit_jax.config import load
from vit_jax.data.tokenizer import open_tokenizer
from vit_jax.errors import UserError
from vit_jax.inference import convert
from vit_jax.models import timm_names
from vit_jax.types import ArraySpec, DataInfo

GOLDEN = Path(__file__).parent.parent / "golden" / "hf_tiny"
CASES = ("aimv2_lit", "clip", "open_clip", "open_clip_siglip", "siglip", "siglip2")


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


def recorded(case):
    return np.load(GOLDEN / case / "io.npz")


def check(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", [case for case in CASES if case != "siglip"])
def test_both_towers_compute_what_the_real_library_computed(case):
    model, params, _ = convert.open_model(str(GOLDEN / case), with_text=True)
    images, expected = np.load(GOLDEN / "images.npz")["images"], recorded(case)

    @jax.jit
    def compute(params, images, tokens):
        found = model.apply({"params": params}, images, tokens)
        return found.text, found.logits(found.image, found.text)

    with jax.default_matmul_precision("highest"):
        text, logits = compute(params, images, expected["tokens"].astype(np.int32))
    check(text, expected["text"] / np.linalg.norm(expected["text"], axis=-1, keepdims=True))
    check(logits, expected["logits"])


@pytest.mark.parametrize("case", CASES)
def test_a_folder_has_the_tokens_of_the_real_library(case):
    expected = recorded(case)
    tokenizer = open_tokenizer(str(GOLDEN / case), expected["tokens"].shape[1])
    rows = tokenizer.encode(expected["texts"].tolist())
    np.testing.assert_array_equal(rows, expected["tokens"])
    assert tokenizer.decode(rows[0]) == "a cat"


@pytest.mark.parametrize("case", [pytest.param("clip", marks=pytest.mark.soak), "siglip"])
def test_an_image_file_matches_texts_as_in_the_real_library(case, tmp_path):
    """A softmax over the texts for CLIP, and a sigmoid for SigLIP."""
    texts = recorded(case)["texts"].tolist()
    argv = ["predict", f"--checkpoint={GOLDEN / case}", str(GOLDEN / "photo.png")]
    argv += [f"--text={text}" for text in texts]
    with jax.default_matmul_precision("highest"):
        assert main([*argv, f"--results={tmp_path}/a.jsonl", "--probabilities"]) == 0
    (line,) = (tmp_path / "a.jsonl").read_text().splitlines()
    found = np.array(list(json.loads(line)["probabilities"].values()))
    expected = recorded(case)["probability"][0]
    if case == "siglip":
        check(np.log(found / (1 - found)), np.log(expected / (1 - expected)))
    check(found, expected)


def contents_of(place):
    """Returns the config and the arrays of a folder."""
    arrays = array_files.read_arrays(place / "model.safetensors")
    return json.loads((place / "config.json").read_text()), arrays


@pytest.mark.parametrize("case", ["aimv2_lit", "clip", "siglip"])
def test_an_export_of_both_towers_has_the_arrays_and_the_config_of_the_real_library(case, tmp_path):
    model, params, (*size, _) = convert.open_model(str(GOLDEN / case), with_text=True)
    checkpoints.save(params, model, tmp_path / "out", "hf", image_size=size)
    (config, arrays), (told, expected) = map(contents_of, (tmp_path / "out", GOLDEN / case))
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.shape == expected[name].shape, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    for section in ("vision_config", "text_config"):
        own, theirs = config.pop(section), told.pop(section)
        for key in own.keys() & theirs.keys() - {"torch_dtype", "projection_dim"}:
            assert own[key] == theirs[key], (section, key)
    assert {key: told[key] for key in config.keys() - {"torch_dtype"}} == {
        key: config[key] for key in config.keys() - {"torch_dtype"}
    }


def test_towers_that_no_class_computes_are_refused(tmp_path):
    model, params, _ = convert.open_model(str(GOLDEN / "clip"), with_text=True)
    changed = model.clone(text=model.text.clone(causal=False))
    with pytest.raises(UserError, match="CLIPModel has another text tower"):
        checkpoints.save(params, changed, tmp_path / "out", "hf", image_size=16)
    params["image_proj"]["bias"] += 1
    for to in ("hf", "open_clip"):
        with pytest.raises(UserError, match="no place for a bias on the projection of images"):
            checkpoints.save(params, model, tmp_path / "out", to, image_size=16)


@pytest.mark.parametrize("case", ["open_clip", "open_clip_siglip"])
def test_a_folder_for_open_clip_is_the_one_that_was_read(case, tmp_path):
    """`convert` reads both towers for it, and every array has open_clip's name, shape and value."""
    text = convert.run(str(GOLDEN / case), str(tmp_path / "out"), "open_clip")
    assert f"open_clip.create_model('local-dir:{tmp_path}/out')" in text
    assert "write hf_tokenizer_name and" in text
    ours, theirs = (
        array_files.read_arrays(folder / "open_clip_model.safetensors")
        for folder in (tmp_path / "out", GOLDEN / case)
    )
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    models_read = [
        infer_towers(loading.read_weights(folder, tower="both")).build()
        for folder in (tmp_path / "out", GOLDEN / case)
    ]
    assert models_read[0] == models_read[1]


def test_an_image_tower_of_timm_goes_to_open_clip_under_its_name(tmp_path):
    image = models.build("timm/test_vit3.r160_in1k", num_classes=None, depth=9)
    sizes = {"width": 16, "depth": 1, "num_heads": 2, "vocab_size": 40, "pooling": "last"}
    model = models.TwoTowers(
        image, models.build("text", **sizes), image.width, 8, project_image=False, bias_init=-10.0
    )
    inputs = np.zeros((1, 160, 160, 3), np.float32)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), inputs)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    checkpoints.save(params, model, tmp_path / "out", "open_clip")
    config = json.loads((tmp_path / "out/open_clip_config.json").read_text())["model_cfg"]
    assert config["vision_cfg"] == {
        "image_size": 160,
        "timm_model_name": "test_vit3",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    weights = loading.read_weights(tmp_path / "out", tower="both")
    read = infer_towers(weights).build()
    again, _ = loading.fit(weights, read, "")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    checkpoints.save(again, read, tmp_path / "again", "open_clip", image_size=160)
    second, first = (
        array_files.read_arrays(tmp_path / name / "open_clip_model.safetensors")
        for name in ("again", "out")
    )
    jax.tree.map(np.testing.assert_array_equal, second, first)
    with pytest.raises(UserError, match="of which this is none with image_size=224; write"):
        checkpoints.save(params, model, tmp_path / "other", "open_clip", image_size=224)
    other = model.clone(backbone=image.clone(num_heads=2))
    with pytest.raises(UserError, match="of which this is none; write --to=orbax"):
        checkpoints.save(params, other, tmp_path / "other", "open_clip")


def test_every_architecture_of_timm_is_found_by_its_model(monkeypatch):
    image = models.build("timm/eva02_large_patch14_clip_224", num_classes=None)
    assert _timm_export.named({}, image)[:2] == ("eva02_large_patch14_clip_224", 224)
    assert _timm_export.named({}, image, 336)[:2] == ("eva02_large_patch14_clip_336", 336)
    beit = models.build("timm/beit_base_patch16_384", num_classes=None)
    offsets = {CLS: np.zeros((1, 1, 768)), PATCHES: np.zeros((16, 16, 3, 768))}
    offsets["backbone/blocks_0/attn/position_bias/table"] = np.zeros((47 * 47 + 3, 12))
    assert _timm_export.named(offsets, beit)[1] == 384
    kept, build = {}, models.build

    def built(kind, **fields):
        key = kind, repr(sorted(fields.items()))
        if key not in kept:
            try:
                kept[key] = build(kind, **fields)
            except UserError as error:
                kept[key] = error
        if isinstance(kept[key], UserError):
            raise kept[key]
        return kept[key]

    def fields_of(timm_class, args):
        kind, told = timm_names.convert(timm_class, args)
        model = built(kind, num_classes=None, **told)
        return model, _timm_export.compared(models.effective_fields(models.fields_of(model)))

    monkeypatch.setattr(models, "build", built)
    classes = {target.name for target in _timm_export.TARGETS}
    seen = set()
    for name, row in timm_names.table().items():
        if row["class"] not in classes:
            continue
        model, fields = fields_of(row["class"], row["args"])
        if repr(fields) in seen:
            continue
        seen.add(repr(fields))
        found, target, args = next(_timm_export._same_architectures(model), (None,) * 3)
        assert found, name
        assert fields_of(target.name, args)[1] == fields, (name, found)
    assert len(seen) > 100


def test_the_bytes_of_clip_may_be_in_two_files(tmp_path):
    """In `vocab.json` and `merges.txt`, as CLIP was first published."""
    rules = json.loads((GOLDEN / "clip" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(rules["vocab"]))
    merges = "\n".join(map(" ".join, rules["merges"]))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    expected = recorded("clip")
    tokenizer = open_tokenizer(str(tmp_path), 8)
    np.testing.assert_array_equal(tokenizer.encode(expected["texts"].tolist()), expected["tokens"])
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"no <\|startoftext\|> and <\|endoftext\|>; is it CLIP's"):
        open_tokenizer(str(tmp_path), 7)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer beside the weights; put its tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json is no tokenizer.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json does not hold a JSON object"),
        (
            "open_clip_config.json",
            '{"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"clean": "wash"}}}}',
            "{'clean': 'wash'} for texts is not read",
        ),
        ("open_clip_config.json", '{"model_cfg": 3}', "open_clip_config.json is broken or cut sh"),
    ],
)
def test_a_folder_without_a_known_tokenizer_is_one_line(tmp_path, name, content, message):
    shutil.copy(GOLDEN / "clip" / "tokenizer.json", tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        open_tokenizer(str(tmp_path), 8)
    assert "\n" not in str(raised.value)


def test_padding_may_come_first(tmp_path):
    shutil.copy(GOLDEN / "siglip2" / "tokenizer.json", tmp_path)
    told = {"pad_token": {"content": "<mask>"}, "padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    (row,) = open_tokenizer(str(tmp_path), 6).encode(["a cat"])
    np.testing.assert_array_equal(row, [4, 4, 6, 5, 21, 1])


def changed(tmp_path, case, **text_config):
    """Copies a folder, with other settings of the text tower in its config."""
    folder = shutil.copytree(GOLDEN / case, tmp_path / case)
    name, *path = ("config.json", "text_config")
    if case.startswith("open_clip"):
        name, *path = ("open_clip_config.json", "model_cfg", "text_cfg")
    config = section = json.loads((folder / name).read_text())
    for key in path:
        section = section[key]
    section.update(text_config)
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("case", "written", "told"),
    [
        ("clip", {"eos_token_id": 2}, {"pooling": "end", "end_token": None, "causal": True}),
        ("clip", {"eos_token_id": 7}, {"pooling": "end", "end_token": 7, "causal": True}),
        ("clip", {"hidden_act": "gelu", "layer_norm_eps": 0.1}, {"norm_epsilon": 0.1}),
        ("open_clip", {"pool_type": "eos", "eos_id": 5}, {"pooling": "end", "end_token": 5}),
        ("open_clip", {"no_causal_mask": True}, {"causal": False, "activation": "gelu"}),
    ],
)
def test_the_config_tells_what_the_text_tower_computes(tmp_path, case, written, told):
    folder = changed(tmp_path, case, **written)
    tower = infer_towers(loading.read_weights(folder, tower="both")).text
    assert {key: tower[key] for key in told} == told


@pytest.mark.parametrize(
    ("case", "written", "message"),
    [
        ("clip", {"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\] of the text tower is no number"),
        ("open_clip", {"eos_id": "a"}, "eos_id='a' is no number"),
        ("open_clip", {"embed_cls": True}, "embed_cls=True is not read"),
        ("open_clip", {"proj_type": "none"}, "proj_type='none' is not read"),
        ("open_clip", {"pool_type": "mean"}, "pool_type='mean'"),
    ],
)
def test_a_text_tower_of_another_kind_is_one_line(tmp_path, case, written, message):
    with pytest.raises(UserError, match=message):
        loading.read_weights(changed(tmp_path, case, **written), tower="both")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("text_projection.weight", (1, 0, 16)),
        ("text_model.embeddings.position_embedding.weight", (1, 0, 16)),
        ("text_model.embeddings.token_embedding.weight", (2, 3, 4)),
    ],
)
def test_a_text_tower_of_other_shapes_is_one_line(tmp_path, name, shape):
    file = changed(tmp_path, "clip") / "model.safetensors"
    arrays = array_files.read_arrays(file)
    files.write_safetensors(file, {**arrays, name: np.ones(shape, np.float32)})
    with pytest.raises(UserError, match="has arrays of other shapes"):
        infer_towers(loading.read_weights(file.parent, tower="both"))


def test_a_tower_is_loaded_alone_and_differences_are_told(tmp_path):
    weights = loading.read_weights(GOLDEN / "clip", tower="both")
    both = infer_towers(weights).build()
    params, _ = loading.fit(weights, both, "clip")
    alone = checkpoints.load(GOLDEN / "clip", both.text)
    jax.tree.map(np.testing.assert_array_equal, alone, params["text"])
    other = both.clone(text=both.text.clone(activation="gelu"))
    _, report = loading.fit(weights, other, "clip")
    (note,) = report.notes
    told = "its own text tower has activation='quick_gelu'; yours has activation='gelu'"
    assert note == told
    with pytest.raises(UserError, match="num_attention_heads=3 does not fit"):
        loading.read_weights(changed(tmp_path, "clip", num_attention_heads=3), tower="both")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("vit", "has no text tower"),
        ("clip/model.safetensors", "does not tell the heads of its text tower; its config.json"),
    ],
)
def test_texts_need_both_towers_and_their_config(folder, message, tmp_path, capsys):
    place = GOLDEN / folder
    if place.is_file():  # Away from its config.
        place = shutil.copy(place, tmp_path)
    argv = ["predict", f"--checkpoint={place}", "photo.png", "--text=a cat"]
    assert main([*argv, "--model.num_heads=2"]) == 2
    assert message in capsys.readouterr().err
    assert main([*argv, "--labels=names.txt"]) == 2
    assert "--labels does not go with --text" in capsys.readouterr().err


@pytest.mark.parametrize("case", [*CASES, "clip/model.safetensors"])
def test_two_towers_without_texts_are_asked_for_them(case, capsys):
    """The projection into the space of texts has no classes to tell."""
    assert main(["predict", f"--checkpoint={GOLDEN / case}", "photo.png"]) == 2
    assert "tells which text fits an image: write --text=TEXT" in capsys.readouterr().err


def zero_shot(root, photos, **arguments):
    told = {"checkpoint": GOLDEN / "siglip", "split": "train", "prompt": "'a {}'", **arguments}
    written = ",".join(f"{key}={value}" for key, value in told.items())
    return f"{root / 'configs' / 'zero_shot.py'}:{photos},{written}"


def test_names_of_classes_are_the_texts_of_a_model_that_was_released(root, tmp_path):
    config = load(zero_shot(root, tmp_path))
    image = ArraySpec((16, 16, 3), np.dtype(np.uint8))
    label = ArraySpec((), np.dtype(np.int32))
    info = DataInfo({"image": image, "label": label}, 2, ("cat", "dog"))
    task = tasks.build(config.task, config.model, info)
    assert (task.loss, task.model.text_length, task.mean) == ("sigmoid", 8, (127.5,) * 3)
    params = checkpoints.load(GOLDEN / "siglip", task.model, image_size=(16, 16), head="keep")
    vectors = jax.eval_shape(task.precompute, params)["class_vectors"]
    assert vectors.shape == (2, 32)
    pp = 'decode|resize((16, 16), method="bicubic", antialias=True)'
    assert config.data.eval_pp == pp
    config = load(zero_shot(root, tmp_path, checkpoint=GOLDEN / "clip"))
    assert config.task.loss == "softmax"
    assert 'resize_small(16, method="bicubic"' in config.data.eval_pp
    with pytest.raises(UserError, match="write checkpoint=FOLDER"):
        load(zero_shot(root, tmp_path, checkpoint=""))


@pytest.mark.soak
def test_zero_shot_accuracy_is_the_share_of_images_that_match_their_class(tmp_path, root):
    draw = np.random.default_rng(0).integers
    for number, name in enumerate(("cat", "dog", "cat", "dog", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(draw(0, 256, (16, 16, 3), np.uint8))
        image.save(tmp_path / "photos" / name / f"{number}.png")
    photos, checkpoint = tmp_path / "photos", f"--checkpoint={GOLDEN / 'siglip'}"
    texts = ["--text=a cat", "--text=a dog"]
    results = f"--results={tmp_path}/a.jsonl"
    assert main(["predict", checkpoint, str(photos), *texts, results]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    right = [line["top"][0]["class"][2:] == Path(line["file"]).parent.name for line in lines]
    config = f"--config={zero_shot(root, photos, batch=8)}"
    assert main(["evaluate", config, checkpoint, f"--json={tmp_path}/found.json"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["train/accuracy"] == pytest.approx(np.mean(right))
