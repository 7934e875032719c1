"""Damaged input of every format but checkpoints: seeds, and what is read of them."""

import functools
import gzip
import io
import json
import os
import struct
import tempfile
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pyarrow as pa
import sentencepiece
from mutations import (
    BYTES,
    changed_json,
    changed_line,
    changed_text,
    cut,
    flip,
    rewritten_member,
    time_limit,
)
from odd_images import encoded, photograph, turned
from pyarrow import parquet
from small_annotations import CAPTIONS, COCO
from tar_files import idx_of, tar_of

from vit_jax import config as config_lib
from vit_jax.data import images, open_source, pp, tfrecord
from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops.decode import decode
from vit_jax.data.prepare import imagenet_tars
from vit_jax.data.sources import _labels, _splits, _tar_index
from vit_jax.data.tokenizer import open_tokenizer
from vit_jax.errors import UserError
from vit_jax.launch.slices import check_name
from vit_jax.parallel import accelerators
from vit_jax.planning.target import parse_tpu

TEXT = [flip, cut, changed_text, changed_text, changed_text]


class Kind(NamedTuple):
    """A format: the file that is damaged, its content, how it is read, and how it is damaged.

    read: returns what the file says, or raises a `UserError`.
    ways: the kinds of damage.
    is_checked: the file has checksums, so that flipped bits are never read as something else.
    """

    file: str
    seed: bytes
    read: Callable[[Path], Any]
    ways: Sequence[Callable[[bytes, Any], bytes]] = tuple(BYTES)
    is_checked: bool = False


def outcome(kind, path):
    """Returns what a file says, or None where a `UserError` of one line refuses it."""
    with time_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return kind.read(path)
        except UserError as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error
            return None


def check(kind, folder, number, tally=None):
    """Raises what reading damage number `number` raises, or an error for a wrong value."""
    rng = np.random.default_rng(number)
    way = kind.ways[rng.integers(len(kind.ways))]
    damaged = way(kind.seed, rng)
    path = Path(folder, kind.file)
    path.write_bytes(damaged)
    found = outcome(kind, path)
    if tally is not None:
        tally["read" if found is not None else "refused"] += 1
    if kind.is_checked and way is flip and found is not None:
        path.write_bytes(kind.seed)
        np.testing.assert_equal(found, kind.read(path), err_msg=f"{way.__name__} {number}")


def read_image(path):
    """Returns the pixels. What TensorFlow decodes, too, has the same size."""
    pixels = images.read_pixels(path)
    with images.naming(path):
        data = images.for_decoding(images.read(path))
    try:
        other = decode(tf.constant(data)).numpy()
    except tf.errors.InvalidArgumentError:
        return pixels
    assert other.shape == pixels.shape
    return pixels


def read_source(source, path, name=None, **args):
    """Returns all records of a source, and the names of its classes."""
    # Damage may keep the size and the time of a tar file, and so its index.
    with mock.patch.object(_tar_index, "CACHE", os.devnull):
        opened = open_source({"source": source, "name": name or str(path), **args})
    rows = np.arange(len(opened))
    with images.naming(path):
        records = opened.fetch(rows)
    assert all(opened.describe(row) for row in rows[:2])
    return records, opened.class_names


def read_index(path):
    with mock.patch.object(_tar_index, "CACHE", os.devnull):
        found = _tar_index.of(str(path).removesuffix(_tar_index.SUFFIX))._asdict()
    return {key: np.asarray(value) for key, value in found.items()}


def index_of(name):
    with tempfile.TemporaryDirectory() as folder:
        write_rest(folder)
        _tar_index.prepare([f"{folder}/{name}"], lambda _: None)
        return Path(folder, name + _tar_index.SUFFIX).read_bytes()


def of(source, **args):
    return lambda path: read_source(source, path, **args)


def beside(source, **args):
    return lambda path: read_source(source, path, images=str(path.parent), **args)


def of_folder(source):
    return lambda path: read_source(source, path, name=str(path.parent))


def read_tfrecord(path):
    shard = types.SimpleNamespace(filename=str(path), skip=0, take=3, examples_in_shard=3)
    reader = tfrecord.TfrecordReader([shard], lambda data: {"": data}, remote=False)
    with images.naming(path):
        return reader.__getitems__(range(3))


def read_checked_tfrecord(path):
    return list(tfrecord.checked_records(str(path)))


def read_tokens(path):
    vocab = str(path.parent if path.suffix == ".json" and path.stem != "tokenizer" else path)
    tokenizer = open_tokenizer.__wrapped__(vocab, 8)
    rows = tokenizer.encode(["a 3 above a 7", ""])
    return rows, [tokenizer.decode(row) for row in rows]


def read_override(path):
    config = config_lib.default_config()
    key, _, value = path.read_bytes().decode(errors="replace").partition("=")
    config_lib.apply_overrides(config, {key.removeprefix("--config."): value})
    return json.dumps(config_lib.validate(config).to_dict())


def text_reader(read):
    return lambda path: read(path.read_bytes().decode(errors="replace"))


def png(value):
    return encoded(photograph(6, 4, seed=value), "PNG")


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def npz():
    buffer = io.BytesIO()
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(buffer, image=pixels, label=np.array([0, 1]), class_names=np.array(["cat", "dog"]))
    return buffer.getvalue()


def table(**options):
    buffer = io.BytesIO()
    columns = {"image": [png(0), png(1), png(2)], "label": ["cat", "dog", "cat"]}
    parquet.write_table(pa.table(columns), buffer, write_page_checksum=True, **options)
    return buffer.getvalue()


def in_pages(data, rng):
    """Flips a bit of a page with images, whose checksum the file has."""
    changed, image = bytearray(data), png(rng.integers(3))
    changed[data.find(image) + rng.integers(len(image))] ^= 1 << rng.integers(8)
    return bytes(changed)


def refused_pages(path):
    """Raises an error unless the damage is noticed."""
    with images.naming(path):
        open_source({"source": "table", "name": str(path)}).fetch(np.arange(3))
    raise AssertionError("a damaged page was read")


def records():
    with tempfile.NamedTemporaryFile() as file:
        with tf.io.TFRecordWriter(file.name) as writer:
            for number in range(3):
                writer.write(png(number))
        return Path(file.name).read_bytes()


def rows(separator, *lines):
    return "".join(separator.join(line) + "\n" for line in lines).encode()


def json_rows(*rows):
    return "\n".join(map(json.dumps, rows)).encode()


def pieces():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a 3 above a 7", "a 2 left of a 5", "a 1 above a 4"] * 20),
        model_writer=model, vocab_size=18, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "3", "7", "above", ",", "dig", "##it")
RULES = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
    "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None, "decoder": None,
    "model": {
        "type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "[UNK]",
    },
}  # fmt: skip
CLIP_VOCAB = ["a", "a</w>", "b", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
TOLD = {
    "tokenizer_class": "CLIPTokenizer", "pad_token": {"content": "a"}, "padding_side": "left",
}  # fmt: skip
PHOTO = photograph(24, 16)
LABELS = (("a.png", "cat"), ("b.png", "dog"), ("c.png", "cat"))
SAMPLES = [
    member
    for number, name in enumerate("ab")
    for member in (
        (f"{name}.png", png(number)),
        (f"{name}.cls", b"%d" % number),
        (f"{name}.json", json.dumps({"label": "xy"[number], "who": 1}).encode()),
    )
]
JSON = [flip, cut, changed_text, changed_json, changed_json, changed_json]
LINES = [flip, cut, changed_text, changed_line, changed_line, changed_line]


def kinds_of_pictures():
    pictures = {
        "jpg": turned(PHOTO, 6), "gif": encoded(PHOTO, "GIF"), "bmp": encoded(PHOTO, "BMP"),
        "webp": encoded(PHOTO, "WEBP"), "tiff": encoded(PHOTO, "TIFF"),
        "tif": encoded(PHOTO, "TIFF", compression="tiff_lzw"), "ppm": encoded(PHOTO, "PPM"),
        "avif": encoded(PHOTO, "AVIF"),
    }  # fmt: skip
    found = {name: Kind(f"x.{name}", data, read_image) for name, data in pictures.items()}
    found["png"] = Kind("x.png", encoded(PHOTO, "PNG"), read_image, is_checked=True)
    clear = PHOTO.convert("RGBA")
    found["clear_png"] = Kind("x.png", encoded(clear, "PNG"), read_image, is_checked=True)
    return found


def kinds_of_annotations():
    captions = beside("captions")
    pairs = (("image", "caption"), ("a.png", "a cat"), ("b.png", '"a dog, wet"'))
    return {
        "coco": Kind("x.json", json.dumps(COCO).encode(), beside("coco"), JSON),
        "captions_coco": Kind("x.json", json.dumps(CAPTIONS).encode(), captions, JSON),
        "captions_csv": Kind("x.csv", rows(",", *pairs), captions, TEXT),
        "captions_tsv": Kind("x.tsv", rows("\t", *pairs), captions, TEXT),
        "captions_jsonl": Kind(
            "x.jsonl",
            json_rows(*({"image": a, "caption": b} for a, b in pairs[1:])),
            captions,
            LINES,
        ),
    }


def kinds_of_tables():
    listed = rows(",", ("image", "label"), *LABELS)
    return {
        "csv": Kind("x.csv", listed, of("table"), TEXT),
        "tsv": Kind("x.tsv", listed.replace(b",", b"\t"), of("table"), TEXT),
        "columns": Kind(
            "x.csv",
            b"image,cat,dog,w\na.png,1,0,2\nb.png,,true,0.5\n",
            of("table", label=["cat", "dog"], weight="w"),
            TEXT,
        ),
        "jsonl": Kind(
            "x.jsonl",
            json_rows(*({"image": a, "label": [b]} for a, b in LABELS)),
            of("table"),
            LINES,
        ),
        "parquet": Kind("x.parquet", table(), of("table")),
        "parquet_pages": Kind(
            "x.parquet",
            table(compression="NONE", use_dictionary=False, write_statistics=False),
            refused_pages,
            [in_pages],
        ),
    }


def kinds_of_archives():
    return {
        "webdataset": Kind("x.tar", tar_of(SAMPLES), of("webdataset")),
        "tar_index": Kind(
            "whole.tar" + _tar_index.SUFFIX,
            index_of("whole.tar"),
            read_index,
            [*BYTES, rewritten_member],
            is_checked=True,
        ),
        "dali_index": Kind(
            "whole.idx",
            idx_of(tar_of(SAMPLES)).encode(),
            lambda path: read_index(path.with_name("whole.tar")),
            TEXT,
            is_checked=True,
        ),
        "imagenet_tar": Kind(
            "x.tar",
            tar_of([("n01.tar", tar_of([("a.JPEG", b"x" * 600)])), ("n02.tar", tar_of([]))]),
            functools.partial(imagenet_tars.read_index, "train"),
        ),
        "tfrecord": Kind("x.tfrecord", records(), read_tfrecord, is_checked=True),
        "tfrecord_check": Kind("x.tfrecord", records(), read_checked_tfrecord, is_checked=True),
    }


def kinds_of_arrays():
    whole = idx(np.ones((2, 4, 4), np.uint8))
    return {
        "npz": Kind("x.npz", npz(), of("npz"), [*BYTES, rewritten_member], is_checked=True),
        "idx": Kind("train-images-idx3-ubyte", whole, of_folder("idx")),
        "idx_gz": Kind(
            "train-images-idx3-ubyte.gz",
            gzip.compress(whole),
            of_folder("idx"),
            is_checked=True,
        ),
    }


def kinds_of_vocabularies():
    return {
        "class_names": Kind(
            "x.txt", b"cat\ndog\nemu\n", lambda x: _labels.read_names(str(x)), TEXT
        ),
        "word_piece": Kind("x.txt", "\n".join(WORDS).encode(), read_tokens, TEXT),
        "sentence_piece": Kind("x.model", pieces(), read_tokens),
        "tokenizer_json": Kind("tokenizer.json", json.dumps(RULES).encode(), read_tokens, JSON),
        "vocab_json": Kind(
            "vocab.json",
            json.dumps({x: i for i, x in enumerate(CLIP_VOCAB)}).encode(),
            read_tokens,
            JSON,
        ),
        "tokenizer_config": Kind(
            "tokenizer_config.json", json.dumps(TOLD).encode(), read_tokens, JSON
        ),
    }


def kinds_of_strings():
    return {name: Kind("x.txt", text.encode(), read, TEXT) for name, text, read in STRINGS}


@functools.cache
def kinds():
    """Returns the kinds of input by their names."""
    families = (
        kinds_of_pictures,
        kinds_of_annotations,
        kinds_of_tables,
        kinds_of_archives,
        kinds_of_arrays,
        kinds_of_vocabularies,
        kinds_of_strings,
    )
    return {name: kind for family in families for name, kind in family().items()}


STRINGS = (
    (
        "preprocessing",
        "decode_jpeg_and_inception_crop(224, area_min=8)|flip_lr|randaug(2, 15)|resize((192, 256),"
        " method='bilinear')|value_range(-1, 1)|keep('image', 'label')",
        text_reader(pp.parse),
    ),
    ("override", "--config.optim.schedule.boundaries=['3 epochs', 20]", read_override),
    ("override_list", "--config.optim.lr_mults=[['head', 2.5], ['.*bias', 0]]", read_override),
    (
        "recipe_argument",
        "root='my, photos',n=2,lr=1e-3,flag=true",
        text_reader(functools.partial(config_lib.parse_arg, root="", n=1, lr=0.1, flag=False)),
    ),
    ("topology", "v5e:16x16", text_reader(parse_tpu)),
    ("slice_type", "v5litepod-256", text_reader(accelerators.parse_slice)),
    ("slice_name", "my-slice-0", text_reader(check_name)),
    (
        "split",
        "train[all but fold 1 of 3][50% per class][fold 1 of 2]",
        text_reader(lambda text: _splits.select(text, np.arange(60) % 3, np.arange(60) // 4)),
    ),
    (
        "split_part",
        "train[10%:1000]",
        text_reader(lambda text: _splits.select_with_every_class(text, np.arange(60) % 3)),
    ),
)


def write_rest(folder):
    """Writes the files that the damaged ones refer to."""
    for number, name in enumerate("abc"):
        Path(folder, f"{name}.png").write_bytes(png(number))
    labels = idx(np.array([0, 1], np.uint8))
    Path(folder, "train-labels-idx1-ubyte").write_bytes(labels)
    Path(folder, "whole.tar").write_bytes(tar_of(SAMPLES))
    os.utime(Path(folder, "whole.tar"), (0, 0))  # The index is that of a file of this time.
    Path(folder, "merges.txt").write_text("#version: 0.2\na b</w>\n")
    if not Path(folder, "vocab.json").exists():
        Path(folder, "vocab.json").write_text(json.dumps({x: i for i, x in enumerate(CLIP_VOCAB)}))
