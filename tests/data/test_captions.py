"""Captions from files of every kind, and from TFDS; what is wrong in them is named by its line."""

import csv
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import odd_images
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from vit_jax.config import load, validate
from vit_jax.data import element_spec, open_source
from vit_jax.errors import UserError
from vit_jax.training.evaluate import Evaluator, open_split
from vit_jax.training.run import Run

CONFIGS = Path(__file__).parents[2] / "configs"
PAIRS = [("a.png", "a cat"), ("b.png", "a dog"), ("a.png", "a black, fat cat")]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def opened(folder, name, content, **keys):
    (folder / name).write_text(content)
    spec = {"source": "captions", "name": str(folder / name), "images": str(folder), **keys}
    return open_source(spec)


CONTENTS = {
    "train.jsonl": "\n".join(json.dumps({"image": i, "caption": c}) for i, c in PAIRS) + "\n\n",
    "train.csv": "caption,image\n" + "\n".join(f'"{c}",{i}' for i, c in PAIRS),
    "train.tsv": "image\tcaption\n" + "\n".join(f"{i}\t{c}" for i, c in PAIRS),
    "train.json": json.dumps(
        {
            "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
            "annotations": [
                {"image_id": 1 + "ab".index(i[0]), "caption": f" {c} "} for i, c in PAIRS
            ],
        }
    ),
}


def test_only_line_feeds_end_lines(folder):
    """U+2028 and U+0085 may stand in a JSON text, and a line feed in a quoted cell."""
    text = "a\u2028cat\x85!"
    line = json.dumps({"image": "a.png", "caption": text}, ensure_ascii=False)
    cells = f'image,caption\na.png,"{text}\nmiaow"\n'
    for name, content in {"train.jsonl": f"{line}\r\n", "train.csv": cells}.items():
        found = opened(folder, name, content).fetch(np.array([0]))["captions"][0][0].decode()
        assert found.removesuffix("\nmiaow") == text


FIRST_PLACES = {
    "train.jsonl": ("line 1", "line 2"),
    "train.csv": ("line 2", "line 3"),
    "train.tsv": ("line 2", "line 3"),
    "train.json": ("annotations[0]", "annotations[1]"),
}
"""Where each image comes first."""


@pytest.mark.parametrize("name", CONTENTS)
def test_a_byte_order_mark_is_passed_over(folder, name):
    assert len(opened(folder, name, "\ufeff" + CONTENTS[name])) == 2


@pytest.mark.parametrize("name", CONTENTS)
def test_lines_of_an_image_are_its_captions(folder, name):
    source = opened(folder, name, CONTENTS[name], max_texts=3)
    assert len(source) == 2
    records = source.fetch(np.array([1, 0]))
    np.testing.assert_array_equal(
        records["captions"], [[b"a dog", b"", b""], [b"a cat", b"a black, fat cat", b""]]
    )
    assert records["image"][0] == (folder / "b.png").read_bytes()
    for index, place in enumerate(FIRST_PLACES[name]):
        assert source.describe(index) == f"{folder}/{'ab'[index]}.png ({folder}/{name}: {place})"


def test_captions_reach_the_batch_as_tokens(folder):
    source = opened(folder, "train.jsonl", CONTENTS["train.jsonl"])
    spec = element_spec(source, "decode|tokenize(8, key='captions')")
    assert spec["tokens"].shape == (5, 8)
    assert (spec["tokens"].vocab, spec["image"].vocab) == ("bytes", "")
    one = element_spec(source, "decode|choose|lower|tokenize(8)|keep('image', 'tokens')")
    assert {name: array.shape for name, array in one.items()} == {
        "image": (8, 8, 3),
        "tokens": (8,),
    }


def coco(images=(1,), of=()):
    listed = [{"id": one, "file_name": f"{number}.png"} for number, one in enumerate(images)]
    annotations = [{"image_id": one, "caption": "a cat"} for one in of]
    return json.dumps({"images": listed, "annotations": annotations})


@pytest.mark.parametrize(
    "rows",
    [
        ['a.png,"a cat', "b.png,a dog"],
        ['a.png,"a cat', "b.png,a dog", 'c.png,a "fat" cat'],
        ['a.png,"a cat', "b.png,a dog", 'c.png,"'],
        ['a.png,"a cat', "b.png,a dog", 'c.png,a cat "'],
        ['a.png,"a cat" or two', "b.png,a dog"],
        ["a.png,'a cat", 'b.png,"'],
    ],
)
def test_a_quote_mark_left_open_swallows_no_rows(folder, rows):
    with pytest.raises(UserError, match=r"line [23] .*quote mark"):
        opened(folder, "c.csv", "\n".join(["image,caption", *rows]))


def test_quote_marks_mean_nothing_between_tabs(folder):
    rows = ['a.png\t"a cat', 'b.png\t"a" dog', '"c".png\ta ""']
    source = opened(folder, "c.tsv", "\r\n".join(["image\tcaption", *rows]))
    found = source._captions[:, 0].tolist()
    assert found == [b'"a cat', b'"a" dog', b'a ""']


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl"])
def test_lines_end_as_on_any_system(folder, name, end):
    source = opened(folder, name, CONTENTS[name].replace("\n", end), max_texts=2)
    assert len(source) == 2
    assert source._captions[1].tolist() == [b"a dog", b""]


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("utf-16", "is in UTF-16: save it as UTF-8"), ("latin-1", "line 3 is no text in UTF-8")],
)
def test_other_encodings_are_named(folder, encoding, message):
    content = "image,caption\na.png,a cat\nb.png,un chat \u00e9norme\n"
    (folder / "c.csv").write_bytes(content.encode(encoding))
    with pytest.raises(UserError, match=message):
        open_source({"source": "captions", "name": f"{folder}/c.csv", "images": str(folder)})


def test_half_a_character_of_json_is_no_traceback(folder):
    source = opened(folder, "c.jsonl", '{"image": "a.png", "caption": "a \\ud83d cat"}')
    assert source._captions[0, 0] == b"a ? cat"


@given(
    st.dictionaries(
        st.text(
            st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=12
        ).filter(lambda name: name.strip() and name not in (".", "..")),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30).filter(
            lambda text: text.strip()
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_csv_and_json_write_is_read_again(captions):
    """Unless a caption looks like a row of its own, which is refused."""
    table, lines = io.StringIO(), []
    writer = csv.writer(table)
    writer.writerow(["image", "caption"])
    for image, caption in captions.items():
        writer.writerow([image, caption])
        lines.append(json.dumps({"image": image, "caption": caption}))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("c.csv", table.getvalue()), ("c.jsonl", "\n".join(lines))):
            Path(folder, name).write_bytes(content.encode())
            spec = {"source": "captions", "name": f"{folder}/{name}", "images": folder}
            source = open_source(spec)
            assert source._files == list(captions)
            read = [text.decode() for text in source._captions[:, 0]]
            assert read == [text.strip() for text in captions.values()]


def test_photographs_are_turned_upright(folder):
    (folder / "a.png").write_bytes(odd_images.turned(odd_images.photograph(), 8))
    for exif, shape in (("apply", (32, 48, 3)), ("ignore", (48, 32, 3))):
        source = opened(folder, "train.jsonl", CONTENTS["train.jsonl"], exif=exif)
        assert element_spec(source, "decode|keep('image')")["image"].shape == shape


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", '{"image": "a.png", "caption": "a"}\n{"image"', "c.jsonl: line 2 is no JSON"),
        ("c.jsonl", '{"image": "a.png"}', "c.jsonl: line 1 has no 'caption'"),
        ("c.jsonl", "[1]", "c.jsonl: line 1 has no 'image'"),
        ("c.csv", "image,text\na.png,a", "line 1 names no columns 'caption', but image, text"),
        ("c.csv", "image,caption,caption\na.png,a,b", "line 1 names 2 columns 'caption'"),
        ("c.csv", "", "line 1 names no columns 'image', but nothing"),
        ("c.csv", "image,caption\na.png", "c.csv: line 2 has no 'caption'"),
        ("c.csv", "image,caption\na.png,a black, fat cat", "line 2 has 3 cells, line 1 has 2"),
        ("c.tsv", "image\tcaption\na.png\ta\tb", "line 2 has 3 cells, line 1 has 2"),
        ("c.csv", "image,caption\na.png,a\n\nb.png,a\0b", "line 4 has a NUL character"),
        ("c.json", "[" * 100_000, "is no JSON: brackets nested too deep"),
        ("c.json", coco(images=[1, 1]), r"images\[1\] and images\[0\] have the same id 1"),
        ("c.json", coco(of=[5]), r"annotations\[0\] is of image 5, which is not listed"),
        ("c.json", coco(of=["1"]), r"not listed \(ids are written as numbers in one place"),
        ("c.json", coco(of=[[1]]), r"annotations\[0\] has image_id \[1\]"),
        ("c.jsonl", '{"image": "/etc/passwd", "caption": "a"}', "line 1 names the file '/etc/pass"),
        ("c.csv", "image,caption\n../x.png,a", "line 2 names the file '../x.png', which is not"),
        ("c.csv", "image,caption\na.png, ", "c.csv: line 2 has no 'caption'"),
        ("c.csv", f"image,caption\na.png,{'x' * 140_000}", "c.csv: .* line 2 .*field limit.*quote"),
        ("c.json", "{}", "c.json has no list 'images'"),
        ("c.json", '{"images": [], "annotations": [{"caption": "a"}]}', r"\[0\] has no 'image_id'"),
        ("c.json", "{", "c.json is no JSON"),
        ("c.yaml", "", "write a file that ends in .jsonl"),
        ("c.jsonl", "", "selects none of 0 examples"),
    ],
)
def test_what_is_wrong_is_named(folder, name, content, message):
    with pytest.raises(UserError, match=message) as raised:
        opened(folder, name, content)
    assert "\n" not in str(raised.value)


def test_missing_files_are_named(folder):
    with pytest.raises(UserError, match="nowhere"):
        opened(folder, "c.jsonl", "", images=str(folder / "nowhere"))
    with pytest.raises(UserError, match=r"gone.csv: No such file"):
        open_source({"source": "captions", "name": "gone.csv", "images": str(folder)})


@pytest.mark.parametrize("loss", [pytest.param("sigmoid", marks=pytest.mark.soak), "softmax"])
def test_the_recipe_fits_captions_of_ones_own(folder, loss):
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text(CONTENTS["train.jsonl"])
    given = f"file={folder}/{{split}}.jsonl,images={folder},size=16,loss={loss}"
    config = load(f"{CONFIGS}/lit_coco.py:{given}").to_dict()
    config["batch_size"] = 8
    config["model"] |= {"width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8}
    config["task"]["text"] |= {"width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8}
    config["task"]["dim"] = 8
    run = Run.build(validate(ConfigDict(config)))
    assert run.task.info.spec["tokens"].shape == (16,)
    frozen, trained = (
        {
            name.partition("/")[0]
            for name, group in run.optimizer.table.items()
            if group.frozen is is_
        }
        for is_ in (True, False)
    )
    assert frozen == {"backbone"}
    assert trained == {"text", "text_proj", "log_scale", *(["bias"] if loss == "sigmoid" else [])}
    val = open_split(run.config, "val")
    assert element_spec(val.source, val.pp)["tokens"].shape == (5, 16)
    run.config.data.eval_pp = val.pp.replace("'bytes'", "'words.txt'")
    message = r"sets.val tokenizes with 'words.txt', config.data.pp with 'bytes'"
    with pytest.raises(UserError, match=message):
        Evaluator(run.config, run.task, run.abstract, run.mesh)
