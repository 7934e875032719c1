"""Names of arrays in timm's state dicts, and the forms of them that differ from this package's."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.fit.surgery import square_side
from vit_jax.checkpoints.weights import Renames
from vit_jax.errors import UserError

State = dict[str, np.ndarray]

BATCH_NORM, BATCH_NORM_EPSILON = ("weight", "bias", "running_mean", "running_var"), 1e-5

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
"""The vectors of differential attention."""


def _mlps(theirs: str, ours: str, swiglu: bool) -> Iterator[tuple[str, str]]:
    names = [(f"{theirs}/fc1", f"{ours}/dense1"), (f"{theirs}/fc1_x", f"{ours}/dense1")]
    yield from reversed(names) if swiglu else names
    yield f"{theirs}/fc1_g", f"{ours}/gate"
    yield f"{theirs}/fc2", f"{ours}/dense2"
    yield f"{theirs}/norm", f"{ours}/norm"


def _attention(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield f"{theirs}/q_norm", f"{ours}/query_norm"
    yield f"{theirs}/k_norm", f"{ours}/key_norm"
    yield f"{theirs}/proj", f"{ours}/out"
    for part in ("query", "key", "value"):
        yield f"{theirs}/{part}", f"{ours}/{part}"
    yield f"{theirs}/frequencies", f"{ours}/rope/frequencies"
    for name in (*LAMBDAS, "initial"):
        yield f"{theirs}/{name}", f"{ours}/difference/{name}"
    yield f"{theirs}/sub_norm", f"{ours}/difference/norm"


def _bias(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield f"{theirs}/relative_position_bias_table", f"{ours}/table"
    for number in (1, 2):
        yield f"{theirs}/mlp/fc{number}", f"{ours}/dense{number}"


def _vit(swiglu: bool) -> Iterator[tuple[str, str]]:
    yield "patch_embed/proj", "backbone/patch_embed"
    yield "patch_embed/norm", "backbone/embed_norm"
    yield from _stem()
    yield "cls_token", "backbone/cls"
    yield "dist_token", "backbone/distill"
    yield "reg_token", "backbone/registers"
    yield "pos_embed", "backbone/pos_embed"
    yield "norm_pre", "backbone/pre_norm"
    yield from _bias("rel_pos_bias", "backbone/position_bias")
    yield from _bias("shared_rel_pos", "backbone/position_bias")
    block, ours = "blocks/{i}", "backbone/blocks_{i}"
    yield f"{block}/norm1", f"{ours}/norm1"
    yield from _attention(f"{block}/attn", f"{ours}/attn")
    yield from _bias(f"{block}/attn/rel_pos", f"{ours}/attn/position_bias")
    yield from _bias(f"{block}/attn", f"{ours}/attn/position_bias")
    yield f"{block}/attn/norm", f"{ours}/attn/norm"
    yield f"{block}/ls1/gamma", f"{ours}/scale1"
    yield f"{block}/norm2", f"{ours}/norm2"
    yield from _mlps(f"{block}/mlp", f"{ours}/mlp", swiglu)
    yield f"{block}/ls2/gamma", f"{ours}/scale2"
    for number in (1, 2):
        yield f"{block}/gamma_{number}", f"{ours}/scale{number}"
    yield "norm", "backbone/norm"
    yield "fc_norm", "backbone/fc_norm"
    pool, ours = "attn_pool", "backbone/map_head"
    yield f"{pool}/latent", f"{ours}/probe"
    yield from _attention(pool, f"{ours}/attn")
    yield f"{pool}/norm", f"{ours}/norm"
    yield from _mlps(f"{pool}/mlp", f"{ours}/mlp", swiglu)
    yield "head", "head"
    yield "head_dist", "head_distill"


def _stem() -> Iterator[tuple[str, str]]:
    root, ours = "patch_embed/backbone", "backbone/stem"
    for part in ("conv", "norm"):
        yield f"{root}/{part}", f"{ours}/root/{part}"
    yield f"{root}/folded/{{i}}", f"{ours}/conv{{i}}"
    yield from _units(f"{root}/", f"{ours}/")


def _units(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """Yields the names of the units of a ResNet, whose numbers `prepare` makes start from 1."""
    unit, ours = f"{theirs}stages/{{k}}/blocks/{{j}}", f"{ours}stage{{k}}/unit{{j}}"
    for part in ("conv", "norm"):
        yield f"{unit}/downsample/{part}", f"{ours}/{part}_proj"
        for number in (1, 2, 3):
            yield f"{unit}/{part}{number}", f"{ours}/{part}{number}"


def _mixer() -> Iterator[tuple[str, str]]:
    yield "stem/proj", "backbone/patch_embed"
    block, ours = "blocks/{i}", "backbone/blocks_{i}"
    yield f"{block}/norm1", f"{ours}/norm1"
    yield f"{block}/norm2", f"{ours}/norm2"
    yield from _mlps(f"{block}/mlp_tokens", f"{ours}/token_mixing", False)
    yield from _mlps(f"{block}/mlp_channels", f"{ours}/channel_mixing", False)
    yield f"{block}/linear_tokens", f"{ours}/token_mixing/dense1"
    for number in (1, 2):
        yield f"{block}/ls{number}", f"{ours}/scale{number}"
    yield "norm", "backbone/norm"
    yield "head", "head"


def _bit() -> Iterator[tuple[str, str]]:
    yield "stem/conv", "backbone/root/conv"
    yield from _units("", "backbone/")
    yield "norm", "backbone/norm"
    yield "head/fc", "head"


VIT = Renames(_vit(swiglu=False))
VIT_SWIGLU = Renames(_vit(swiglu=True))
MIXER = Renames(_mixer())
BIT = Renames(_bit())

MARKS = frozenset(
    (
        *("patch_embed.proj.weight", "patch_embed.backbone.conv.weight", "stem.proj.weight"),
        *("patch_embed.backbone.stem.conv.weight", "embeds.proj.weight"),
        "patch_embed.backbone.0.conv.weight",
        "stages.0.blocks.0.downsample.conv.weight",
    )
)
"""Names of which every state dict has one."""

BUFFERS = re.compile(r".*relative_position_index|.*rel_coords_log|(.*\.)?mask_token")


def table_of(state: Mapping[str, np.ndarray]) -> Renames:
    """Returns the table of names that a prepared state dict has."""
    if "stem.proj.weight" in state:
        return MIXER
    return BIT if "stem.conv.weight" in state else VIT


def prepare(state: Mapping[str, np.ndarray], args: Mapping[str, Any] | None) -> State:
    """Returns a state dict in the one form that the tables of names have.

    args: the arguments of timm's model, or None where they are not known.
    """
    state = {name: x for name, x in state.items() if not BUFFERS.fullmatch(name)}
    state = {_plain_name(name): x for name, x in _fold_stem(state).items()}
    if "embeds.proj.weight" in state:
        state, args = _of_naflex(state), {"no_embed_class": True}
    state = _split_parallel(state) if "blocks.0.in_proj.weight" in state else state
    state = _split_attention(state)
    state = _with_initial_lambdas(state)
    state = _split_gated(state)
    state = _split_frequencies(state)
    return _fold_prefix(state, args)


def _fold_stem(state: State) -> State:
    """Folds the batch norms of a convolutional stem; its last convolution embeds the patches.

    Raises:
      UserError: a variance is negative, or an array of a norm is missing.
    """
    stem = "patch_embed.backbone."
    folded = {
        name: x for name, x in state.items() if not re.match(rf"{re.escape(stem)}\d+\.", name)
    }
    for i in range(len(state) - len(folded)):
        last = f"{stem}{i}.conv.bias"
        if last in state:
            convolution = {"weight": state[f"{stem}{i}.conv.weight"], "bias": state[last]}
            return folded | {f"patch_embed.proj.{key}": x for key, x in convolution.items()}
        try:
            parts = [state[f"{stem}{i}.bn.{part}"] for part in BATCH_NORM]
            kernel = state[f"{stem}{i}.conv.weight"]
        except KeyError as error:
            raise UserError(f"the convolutional stem lacks {error}") from error
        scale, bias, mean, variance = parts
        factor = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
        folded[f"{stem}folded.{i}.weight"] = kernel * factor[:, None, None, None]
        folded[f"{stem}folded.{i}.bias"] = bias - mean * factor
    return folded


def _plain_name(name: str) -> str:
    """Returns the name of an array with one name for each kind of layer.

    Convolutional stems of hybrids are below `stem` where they have stages; stages and units of
    ResNets count from 0; ResMLP has its own words for scale and shift.
    """
    name = name.replace("patch_embed.backbone.stem.", "patch_embed.backbone.")

    def counted(match: re.Match[str]) -> str:
        return f"stages.{int(match[1]) + 1}.blocks.{int(match[2]) + 1}."

    name = re.sub(r"stages\.(\d+)\.blocks\.(\d+)\.", counted, name)
    name = re.sub(r"(norm\d?)\.alpha$", r"\1.weight", name)
    return re.sub(r"(norm\d?)\.beta$", r"\1.bias", name)


def _of_naflex(state: State) -> State:
    """Returns the state dict of a `NaFlexVit` under the names of a `VisionTransformer`."""
    out = {}
    for name, array in state.items():
        inner = name.removeprefix("embeds.")
        place = f"patch_embed.{inner}" if inner.startswith(("proj.", "norm.")) else inner
        out[place if inner != name else name] = array
    kernel = out["patch_embed.proj.weight"]
    if kernel.ndim == 2:
        side = math.isqrt(kernel.shape[1] // 3)
        flat = kernel.reshape(len(kernel), side, side, -1)
        out["patch_embed.proj.weight"] = flat.transpose(0, 3, 1, 2)
    if "pos_embed_y" in out:
        down, across = out.pop("pos_embed_y"), out.pop("pos_embed_x")
        out["pos_embed"] = down[:, :, None] + across[:, None]
    table = out.get("pos_embed")
    if table is not None and table.ndim == 4:
        out["pos_embed"] = table.reshape(1, -1, table.shape[-1])
    return out


def grid_of(state: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """Returns (rows, columns) of a table of positions that shows them; None for others."""
    if "embeds.pos_embed_y" in state:
        return state["embeds.pos_embed_y"].shape[1], state["embeds.pos_embed_x"].shape[1]
    table = state.get("embeds.pos_embed")
    return table.shape[1:3] if table is not None and table.ndim == 4 else None


def _split_parallel(state: State) -> State:
    """Splits the layers of MLP and attention together, of timm's parallel blocks."""
    out = {}
    names = {"in_norm": "norm1", "attn_out_proj": "attn.proj", "mlp_out_proj": "mlp.fc2"}
    names |= {"q_norm": "attn.q_norm", "k_norm": "attn.k_norm", "ls": "ls1"}
    names |= {part: f"attn.{part}" for part in ("sub_norm", *LAMBDAS)}
    for name, array in state.items():
        match = re.fullmatch(r"(blocks\.\d+)\.(\w+)(\..*)?", name)
        block, part, leaf = match.groups("") if match else ("", "", "")
        if part == "in_proj":
            width = state[f"{block}.in_proj.weight"].shape[1]
            hidden, qkv = np.split(array, [len(array) - 3 * width])
            out[f"{block}.mlp.fc1{leaf}"], out[f"{block}.attn.qkv{leaf}"] = hidden, qkv
        elif part == "mlp_bias":
            out[f"{block}.mlp.fc1.bias"] = array
        elif part == "out_proj" and leaf == ".weight":
            width = len(array)
            out[f"{block}.attn.proj.weight"], out[f"{block}.mlp.fc2.weight"] = np.split(
                array, [width], axis=1
            )
        elif part == "out_proj":
            out[f"{block}.attn.proj.bias"], out[f"{block}.mlp.fc2.bias"] = array, 0 * array
        else:
            out[f"{block}.{names[part]}{leaf}" if part in names else name] = array
    return out


def _split_attention(state: State) -> State:
    """Returns every fused projection as query, key and value, and biases under their modules."""
    parts = {"qkv": ("query", "key", "value"), "kv": ("key", "value"), "q": ("query",)}
    parts |= {f"{part[0]}_proj": (part,) for part in parts["qkv"]}
    out = {}
    for name, array in state.items():
        module, _, leaf = name.rpartition(".")
        parent, _, kind = module.rpartition(".")
        if re.fullmatch(r".*attn\.[qkv]_bias", name):
            part = {"q": "query", "k": "key", "v": "value"}[leaf[0]]
            out[f"{module}.{part}.bias"] = array
        elif kind not in parts:
            out[name] = array
        elif not array.ndim or len(array) % len(parts[kind]):
            raise UserError(
                f"{name} has shape {list(array.shape)}, not {len(parts[kind])} equal parts"
            )
        else:
            pieces = np.split(array, len(parts[kind]))
            names = (f"{parent}.{part}.{leaf}" for part in parts[kind])
            out.update(zip(names, pieces, strict=True))
    return out


def initial_lambda(block: int) -> float:
    """Returns the constant of a block's differential attention (Ye et al. 2025, section 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * block)


def _with_initial_lambdas(state: State) -> State:
    """Adds the constants of differential attention, which timm keeps in no array."""
    found = [re.fullmatch(r"(blocks\.(\d+)\.attn)\.lambda_q1", name) for name in state]
    constants = {
        f"{match[1]}.initial": np.array([initial_lambda(int(match[2]))], np.float32)
        for match in found
        if match
    }
    return state | constants


def _split_gated(state: State) -> State:
    """Splits the first layer of a SwiGLU in one matrix into the gate, which comes first, and x."""
    out = {}
    for name, array in state.items():
        module, _, leaf = name.rpartition(".fc1.")
        last = state.get(f"{module}.fc2.weight")
        is_packed = last is not None and last.ndim == 2 and array.shape[:1] == (2 * last.shape[1],)
        if leaf and is_packed:
            gate, x = np.split(array, 2)
            out[f"{module}.fc1_g.{leaf}"], out[f"{module}.fc1_x.{leaf}"] = gate, x
        else:
            out[name] = array
    return out


def _split_frequencies(state: State) -> State:
    """Gives every block its rotary frequencies, which timm keeps together, columns first."""
    if "rope.freqs" not in state:
        return state
    frequencies = state.pop("rope.freqs")[::-1]
    blocks = {
        f"blocks.{i}.attn.frequencies": x for i, x in enumerate(np.moveaxis(frequencies, 1, 0))
    }
    return state | blocks


def _fold_prefix(state: State, args: Mapping[str, Any] | None) -> State:
    """Adds the positions of registers and of a distillation token to these tokens.

    The sum is what timm computes; the class token's row stays where no registers follow it.
    """
    table = state.get("pos_embed")
    extra = next((name for name in ("reg_token", "dist_token") if name in state), None)
    if table is None or extra is None or table.ndim != 3:
        return state
    first, count = int("cls_token" in state), state[extra].shape[1]
    patches = table.shape[1] - first - count
    known = (args or {}).get("no_embed_class")
    fits = square_side(table.shape[1]) is None and square_side(max(patches, 0)) is not None
    has_rows = not known if args is not None else fits
    if not has_rows or patches < 1:
        return state
    rows, rest = table[:, first : first + count], table[:, first + count :]
    state = state | {extra: state[extra] + rows}
    if first and extra == "reg_token":
        state["cls_token"] = state["cls_token"] + table[:, :1]
    elif first:
        rest = np.concatenate([table[:, :1], rest], axis=1)
    return state | {"pos_embed": rest}
