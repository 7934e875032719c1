"""State dicts in the forms that timm's classes have: the inverse of `_timm.prepare`.

Each function takes a state dict under the names of `_timm.VIT` and timm's arguments.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.formats._timm import LAMBDAS, State, initial_lambda
from vit_jax.errors import UserError

Args = Mapping[str, Any]


def of_vit(state: State, args: Args) -> State:
    """Returns the state dict of a `VisionTransformer` whose blocks are of any kind."""
    state = _with_norm_biases(fuse(_without_initial_lambdas(state)), args)
    block = args.get("block_fn", "")
    return _joined_parallel(state, block.startswith("Diff")) if block else state


def of_distilled(state: State, args: Args) -> State:
    """Gives the distillation token positions of zero, which timm keeps after the class token's."""
    table = state["pos_embed"]
    table = np.concatenate([table[:, :1], np.zeros_like(table[:, :1]), table[:, 1:]], axis=1)
    return of_vit({**state, "pos_embed": table}, args)


def _without_initial_lambdas(state: State) -> State:
    """Leaves out constants of differential attention, which timm computes.

    Raises:
      UserError: a constant is another.
    """
    out = {}
    for name, array in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.attn\.initial", name)
        if not match:
            out[name] = array
        elif not np.allclose(array, initial_lambda(int(match[1]))):
            raise UserError(f"timm computes {name}, which is another; write --to=orbax")
    return out


_OF_PARALLEL = {
    **{"norm1": "in_norm", "attn.proj": "attn_out_proj", "mlp.fc2": "mlp_out_proj"},
    **{"attn.q_norm": "q_norm", "attn.k_norm": "k_norm", "ls1": "ls", "attn.sub_norm": "sub_norm"},
}


def _joined_parallel(state: State, differential: bool) -> State:
    """Joins the layers of MLP and attention; the inverse of `_timm._split_parallel`."""
    out = {}
    for name, array in state.items():
        match = re.fullmatch(r"(blocks\.\d+)\.(.+)\.(\w+)", name)
        block, layer, leaf = match.groups("") if match else ("", "", "")
        qkv, fc2 = f"{block}.attn.qkv.{leaf}", state.get(f"{block}.mlp.fc2.{leaf}")
        if layer == "mlp.fc1" and qkv in state:
            out[f"{block}.in_proj.{leaf}"] = np.concatenate([array, state[qkv]])
        elif layer == "mlp.fc1":
            out[f"{block}.mlp_bias"] = array
        elif differential and layer == "attn.proj" and fc2 is not None:
            joined = array + fc2 if leaf == "bias" else np.concatenate([array, fc2], axis=1)
            out[f"{block}.out_proj.{leaf}"] = joined
        elif layer == "attn" and leaf in LAMBDAS:
            out[f"{block}.{leaf}"] = array
        elif layer != "attn.qkv" and not (differential and layer == "mlp.fc2"):
            out[f"{block}.{_OF_PARALLEL[layer]}.{leaf}" if layer in _OF_PARALLEL else name] = array
    return out


def of_eva(state: State, args: Args) -> State:
    """Returns the state dict of an `Eva`, whose arguments say what is joined."""
    state = _joined_frequencies(_with_gammas(state))
    if args.get("swiglu_mlp") and not (args.get("scale_mlp") or args.get("swiglu_align_to")):
        state = _packed(state)
    if args.get("qkv_fused") is False:
        inner = r"(blocks\.\d+\.attn\.)(q|k|v)(?:uery|ey|alue)\."
        state = {re.sub(inner, r"\1\2_proj.", name): x for name, x in state.items()}
    elif args.get("attn_type", "eva") == "eva":
        state = _separate_biases(state)
    return _with_norm_biases(fuse(state), args)


def of_beit(state: State, args: Args) -> State:
    """Returns the state dict of a `Beit`."""
    del args
    state = {name.replace(".attn.rel_pos.", ".attn."): x for name, x in state.items()}
    return fuse(_separate_biases(_with_gammas(state)))


def of_relpos(state: State, args: Args) -> State:
    """Returns the state dict of a `VisionTransformerRelPos`."""
    state = {re.sub(r"^rel_pos_bias\.", "shared_rel_pos.", name): x for name, x in state.items()}
    return _with_norm_biases(fuse(state), args)


def _with_gammas(state: State) -> State:
    return {re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name): x for name, x in state.items()}


def _separate_biases(state: State) -> State:
    """Puts the biases of queries and values beside the joined matrix, which has none."""
    inner = r"(blocks\.\d+\.attn\.)(q|v)(?:uery|alue)\.bias"
    return {re.sub(inner, r"\1\2_bias", name): x for name, x in state.items()}


def _packed(state: State) -> State:
    """Joins the gates of the MLPs and their first layers; the inverse of `_timm._split_gated`."""
    out = {}
    for name, array in state.items():
        if ".mlp.fc1_g." in name:
            x = state[name.replace("fc1_g", "fc1_x")]
            out[name.replace("fc1_g", "fc1")] = np.concatenate([array, x])
        elif ".mlp.fc1_x." not in name:
            out[name] = array
    return out


def _joined_frequencies(state: State) -> State:
    """Joins the rotary frequencies of all blocks; the inverse of `_timm._split_frequencies`."""
    ending = ".attn.frequencies"
    blocks = sorted((n for n in state if n.endswith(ending)), key=lambda n: int(n.split(".")[1]))
    if not blocks:
        return state
    joined = np.stack([state[name] for name in blocks], axis=1)[::-1]
    kept = {name: x for name, x in state.items() if not name.endswith(ending)}
    return kept | {"rope.freqs": np.ascontiguousarray(joined)}


def _with_norm_biases(state: State, args: Args) -> State:
    """Adds the biases of timm's norms of queries and keys; those of this package have none."""
    if args.get("qk_norm") and (args.get("norm_layer") or "LayerNorm").startswith("LayerNorm"):
        names = [n for n in state if n.endswith(("q_norm.weight", "k_norm.weight"))]
        zeros = {name.replace("weight", "bias"): np.zeros_like(state[name]) for name in names}
        return state | zeros
    return state


def fuse(state: Mapping[str, np.ndarray]) -> State:
    """Joins queries, keys and values; the inverse of `_timm._split_attention`."""
    out = {}
    for name, array in state.items():
        module, _, leaf = name.rpartition(".")
        parent, _, part = module.rpartition(".")
        if part not in ("query", "key", "value"):
            out[name] = array
        elif part == "query":
            pool = parent == "attn_pool"
            parts = [state[f"{parent}.{p}.{leaf}"] for p in ("query", "key", "value")]
            if pool:
                out[f"{parent}.q.{leaf}"] = parts.pop(0)
            out[f"{parent}.{'kv' if pool else 'qkv'}.{leaf}"] = np.concatenate(parts)
    return out
