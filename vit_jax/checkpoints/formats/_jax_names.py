"""Names of the arrays in `.npz` files of vision_transformer and big_vision.

Their layouts are those of this package: convolutions `[h, w, in, out]`, dense `[in, out]`,
attention `[width, heads, head_dim]`. Inside a block, vision_transformer's published files number
modules in order of use (LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3); Flax
Linen and big_vision number them by type. Both are read; each is written where it is expected.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import (
    Renames,
    Weights,
    add,
    join_towers,
    map_blocks,
    split_towers,
)

PREFIXES = ("opt/target/", "params/img/", "params/", "img/")
TEXT_PREFIXES = ("params/txt/", "txt/")

BY_USE = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
BY_TYPE = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")

VT_POSITIONS = "Transformer/posembed_input/pos_embedding"
BV_POSITIONS = "pos_embedding"


def _mlp(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for number in (0, 1):
        yield f"{theirs}/Dense_{number}", f"{ours}/dense{number + 1}"


def _block(theirs: str, ours: str, modules: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    norm1, attention, norm2, mlp = modules
    yield f"{theirs}/{norm1}", f"{ours}/norm1"
    yield f"{theirs}/{attention}", f"{ours}/attn"
    yield f"{theirs}/{norm2}", f"{ours}/norm2"
    yield from _mlp(f"{theirs}/{mlp}", f"{ours}/mlp")


def _stem() -> Iterator[tuple[str, str]]:
    yield "conv_root", "backbone/stem/root/conv"
    yield "gn_root", "backbone/stem/root/norm"
    unit, ours = "block{k}/unit{j}", "backbone/stem/stage{k}/unit{j}"
    yield f"{unit}/conv_proj", f"{ours}/conv_proj"
    yield f"{unit}/gn_proj", f"{ours}/norm_proj"
    for number in (1, 2, 3):
        yield f"{unit}/conv{number}", f"{ours}/conv{number}"
        yield f"{unit}/gn{number}", f"{ours}/norm{number}"


def _vit(positions: str, *blocks: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    yield "embedding", "backbone/patch_embed"
    yield "cls", "backbone/cls"
    yield positions, "backbone/pos_embed"
    for modules in blocks:
        yield from _block("Transformer/encoderblock_{i}", "backbone/blocks_{i}", modules)
    yield "Transformer/encoder_norm", "backbone/norm"
    norm, attention, mlp = "LayerNorm_0", "MultiHeadDotProductAttention_0", "MlpBlock_0"
    yield "MAPHead_0/probe", "backbone/map_head/probe"
    yield f"MAPHead_0/{attention}", "backbone/map_head/attn"
    yield f"MAPHead_0/{norm}", "backbone/map_head/norm"
    yield from _mlp(f"MAPHead_0/{mlp}", "backbone/map_head/mlp")
    yield "pre_logits", "head/pre_logits"
    yield "head", "head"


def _mixer() -> Iterator[tuple[str, str]]:
    yield "stem", "backbone/patch_embed"
    block, ours = "MixerBlock_{i}", "backbone/blocks_{i}"
    yield f"{block}/LayerNorm_0", f"{ours}/norm1"
    yield f"{block}/LayerNorm_1", f"{ours}/norm2"
    for kind in ("token_mixing", "channel_mixing"):
        yield from _mlp(f"{block}/{kind}", f"{ours}/{kind}")
    yield "pre_head_layer_norm", "backbone/norm"
    yield "head", "head"


def _text() -> Iterator[tuple[str, str]]:
    yield "Embed_0/embedding", "backbone/token_embed"
    yield "pos_embedding", "backbone/pos_embed"
    yield from _block("Encoder_0/encoderblock_{i}", "backbone/blocks_{i}", BY_TYPE)
    yield "Encoder_0/encoder_norm", "backbone/norm"
    yield "head", "head"


def _bert() -> Iterator[tuple[str, str]]:
    tables = {"token_ids": "token_embed", "position_ids": "pos_embed"}
    for theirs, ours in {**tables, "segment_ids": "segment_embed"}.items():
        yield f"BertEncoder_0/embedder/embedders_{theirs}/embedding", f"backbone/{ours}"
    yield "BertEncoder_0/layer_norm", "backbone/embed_norm"
    layer, ours = "BertEncoder_0/encoder_block/layer_sequence/layers_{i}", "backbone/blocks_{i}"
    yield f"{layer}/attention_block/dense_layer", f"{ours}/attn/out"
    yield f"{layer}/attention_block/attention_layer", f"{ours}/attn"
    yield f"{layer}/attention_block/layer_norm", f"{ours}/norm1"
    yield f"{layer}/mlp_block/mlp/dense_layer", f"{ours}/mlp/dense1"
    yield f"{layer}/mlp_block/dense_layer", f"{ours}/mlp/dense2"
    yield f"{layer}/mlp_block/layer_norm", f"{ours}/norm2"
    yield "head", "head"


VISION_TRANSFORMER = Renames([*_vit(VT_POSITIONS, BY_USE, BY_TYPE), *_stem()])
LIT = Renames([*_vit(VT_POSITIONS, BY_TYPE, BY_USE), *_stem()])
BIG_VISION = Renames([*_vit(BV_POSITIONS, BY_TYPE, BY_USE), *_stem()])
MIXER = Renames(_mixer())
TEXT = Renames(_text())
BERT = Renames(_bert())


_MARKS = re.compile(
    r"(^|/)(embedding|stem|Embed_0|BertEncoder_0|Transformer|MixerBlock_\d+|Encoder_0)/"
)


def matches(names: Collection[str]) -> bool:
    """Returns whether these are names of one of the two codebases."""
    return any(map(_MARKS.search, names))


def is_big_vision(names: Collection[str]) -> bool:
    """Returns whether these are names of big_vision, as far as they differ."""
    prefix = _prefix(names, text=False)
    mine = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    has_marks = BV_POSITIONS in mine or any(name.startswith("MAPHead_0/") for name in mine)
    return "embedding/kernel" in mine and has_marks


# Their names, and those of this package, of the arrays outside both towers.
_BETWEEN = {"t": "log_scale", "b": "bias"}


def read(source: Source) -> Weights:
    """Returns the weights of a file: of an image-text model those of the wanted tower, or of both.

    Both are taken where the file has both.
    """
    arrays = source.arrays()
    if source.tower == "both" and any(name.startswith(TEXT_PREFIXES) for name in arrays):
        return _read_both(arrays)
    return _read_tower(arrays, text=source.tower == "text")


def _read_both(arrays: Mapping[str, np.ndarray]) -> Weights:
    """Returns the weights of `models.TwoTowers`."""
    towers = (_read_tower(arrays, text=text) for text in (False, True))
    # What is outside one tower is the other, or between them.
    image, text = (dataclasses.replace(tower, ignored=()) for tower in towers)
    loose = {name.removeprefix("params/"): x for name, x in arrays.items()}
    between = {ours: loose[theirs] for theirs, ours in _BETWEEN.items() if theirs in loose}
    return join_towers(image, text, between)


def _read_tower(arrays: Mapping[str, np.ndarray], text: bool) -> Weights:
    mine, ignored = _tower(arrays, text)
    blocks = "Encoder_0/encoderblock" if text else "Transformer/encoderblock"
    mine = map_blocks(mine, blocks, lambda i: f"{blocks}_{i}")
    table, class_row, naming = _recognize(mine, text)
    found: dict[str, np.ndarray] = {}
    unknown = []
    for name, array in mine.items():
        ours = table.to_ours(name)
        if ours is None:
            unknown.append(name)
        else:
            add(found, ours, _common_shape(ours, array), name)
    return Weights(
        arrays=found,
        format=naming,
        class_row=class_row,
        ignored=tuple(ignored),
        unknown=tuple(unknown),
    )


def _prefix(names: Iterable[str], *, text: bool) -> str:
    """Returns the prefix that the names of one model share."""
    names, prefixes = list(names), TEXT_PREFIXES if text else PREFIXES
    return next((p for p in prefixes if any(name.startswith(p) for name in names)), "")


def _tower(arrays: Mapping[str, np.ndarray], text: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the arrays of one model, without the prefix they share, and what was left out."""
    prefix = _prefix(arrays, text=text)
    mine = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
    groups: dict[str, list[str]] = {}
    for name in arrays:
        if not name.startswith(prefix):
            groups.setdefault(name.partition("/")[0], []).append(name)
    reason = "outside the model's own arrays (another tower, optimizer state or counters)"
    others = [x[0] if len(x) == 1 else f"{g}/ ({len(x)} arrays)" for g, x in groups.items()]
    return mine, [f"{other}: {reason}" for other in others]


def _recognize(arrays: Mapping[str, np.ndarray], text: bool) -> tuple[Renames, bool | None, str]:
    """Returns the table of names, whether the positions have a class token's row, and a label."""
    if any(name.startswith("BertEncoder_0/") for name in arrays):
        return BERT, False, "npz of a LiT text tower (BERT)"
    if text:
        return TEXT, False, "npz of a LiT text tower"
    if any(name.startswith("MixerBlock_") for name in arrays):
        return MIXER, None, "npz of a Mixer (vision_transformer naming)"
    if BV_POSITIONS in arrays or any(name.startswith("MAPHead_0/") for name in arrays):
        return BIG_VISION, None, "npz in big_vision naming"
    by_use = any(re.search(r"/MlpBlock_3/", name) for name in arrays)
    return VISION_TRANSFORMER, True, f"npz in {'published' if by_use else 'Linen'} naming"


def _common_shape(name: str, array: np.ndarray) -> np.ndarray:
    """Reshapes the group norms `[1, 1, 1, channels]` of old hybrids, and BERT's positions."""
    is_norm = name.startswith("backbone/stem/") and name.endswith(("/scale", "/bias"))
    if is_norm and array.shape[:-1] == (1, 1, 1):
        return array.reshape(-1)
    return array[None] if name == "backbone/pos_embed" and array.ndim == 2 else array


def write(
    arrays: Mapping[str, np.ndarray], naming: Renames, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Returns arrays under their names: the inverse of `read`.

    Those of `models.TwoTowers` are below `img/`, the image tower in `naming`, and `txt/`.
    """
    if not any(name.startswith("text/") for name in arrays):
        return _write_tower(arrays, naming, prefix)
    alone = split_towers(arrays)
    text = TEXT
    if "backbone/segment_embed" in alone["text"]:
        text = BERT
        alone["text"] = {name: _bert_shape(name, x) for name, x in alone["text"].items()}
    return {
        **_write_tower(alone["image"], naming, f"{prefix}img/"),
        **_write_tower(alone["text"], text, f"{prefix}txt/"),
        **{prefix + theirs: arrays[ours] for theirs, ours in _BETWEEN.items() if ours in arrays},
    }


def _write_tower(
    arrays: Mapping[str, np.ndarray], naming: Renames, prefix: str
) -> dict[str, np.ndarray]:
    out = {}
    for name, array in arrays.items():
        theirs = naming.to_theirs(name)
        if theirs is None:
            raise KeyError(name)
        out[prefix + theirs] = array
    return out


def _bert_shape(name: str, array: np.ndarray) -> np.ndarray:
    """Reshapes BERT's positions to a matrix, and joins its heads with their channels."""
    if name == "backbone/pos_embed":
        return array[0]
    if "/attn/" not in name or array.ndim == 1:
        return array
    if array.ndim == 2:
        return array.reshape(-1)
    width = array.shape[-1] if "/out/" in name else array.size // array.shape[0]
    return array.reshape(-1, width)
