"""Each published recipe resolves to the values of its ledger, so that no default can drift.

A row of `configs/NAME.csv` is one setting: the arguments of the recipe, the key, the value as JSON,
where the source says so, and the source's own value where it differs. "not looked up" marks what
could not be. The first arguments of a file have all settings, the others what differs from the
first.
"""

import csv
import dataclasses
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

from vit_jax import tasks
from vit_jax.config import load
from vit_jax.models import registry
from vit_jax.models.heads.classifier import Classifier
from vit_jax.optim.rule import RULES

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
COLUMNS = ["arguments", "key", "value", "source", "theirs"]
NAMES = sorted(path.stem for path in CONFIGS.glob("*.csv"))


def rows_of(name):
    with open(CONFIGS / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def defaults(fields):
    """The defaults of a dataclass that are plain values."""
    return {
        field.name: field.default
        for field in dataclasses.fields(fields)
        if field.init and not callable(field.default) and field.default is not dataclasses.MISSING
    }


def resolved(name, arguments):
    """Every setting of a recipe by key, with the defaults of its model, task and optimizer."""
    config = load(f"{CONFIGS}/{name}.py:{arguments}").to_dict()
    variant = registry.variants()[registry.find(config["model"]["name"])]
    model = {**defaults(Classifier), **defaults(variant.module), **variant.fields}
    config["model"] = model | config["model"]
    task = tasks.TASKS.find(config["task"]["name"])
    config["task"] = defaults(task) | config["task"]
    parameters = inspect.signature(RULES.find(config["optim"]["name"])).parameters.values()
    rule = {p.name: p.default for p in parameters if p.default is not p.empty}
    config["optim"]["args"] = rule | config["optim"]["args"]
    return json.loads(json.dumps(flat(config), default=str))


def flat(tree, prefix=""):
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{prefix}{key}.").items()}


# What a recipe is made of. Fields that models and tasks get later have neutral defaults, so that
# ledgers need no rows for them.
MODEL = (
    *("patch_size", "width", "depth", "num_heads", "mlp_dim", "tokens_mlp_dim", "channels_mlp_dim"),
    *("stages", "width_factor", "pooling", "position", "class_token_position", "num_registers"),
    *("initialization", "head_zero_init", "head_bias_init", "representation_size", "layer_scale"),
    *("qk_norm", "norm", "norm_epsilon", "mlp", "activation", "qkv_bias", "proj_bias", "mlp_bias"),
    *("dropout", "attention_dropout", "drop_path", "constant_drop_path", "patch_drop"),
    *("dtype", "residual_dtype"),
)
TASK = (
    *("loss", "label_smoothing", "mixup", "cutmix", "mixing_groups", "multihot_mixing", "erasing"),
    *("mean", "std", "num_classes", "head", "subcells", "decoder_depth", "decoder_width"),
    *("decoder_dropout", "pyramid", "dice", "stride", "class_weight", "l1_weight", "giou_weight"),
    *("no_object_weight", "text.dropout", "text.dtype", "dim", "project_image", "scale", "bias"),
    *("mask_ratio", "norm_pixels", "cell", "ratio", "num_prototypes", "head_depth", "head_hidden"),
    *("head_bottleneck", "center_momentum", "student_temperature", "temperature_warmup"),
    *("ibot_prototypes", "teacher", "dino_weight", "ibot_weight", "koleo_weight", "mask_share"),
    *("mask_block", "sinkhorn_iterations", "predictor_width", "predictor_depth", "num_targets"),
    *("predictor_heads", "predictor_mlp_dim", "num_contexts", "target_scale", "context_scale"),
    *("target_aspect", "min_keep", "overlap", "context_patches", "mask_groups"),
)
INGREDIENTS = re.compile(
    rf"total|batch_size|accum_steps|ema_decay|precision|data\.(split|pp|eval_pp|repeats)"
    rf"|model\.({'|'.join(MODEL)})|task\.({'|'.join(TASK)})|optim\.args\..*"
    r"|optim\.(name|lr|weight_decay|decay_coupling|decay_mask|decay_mults|clip_norm|layer_decay)"
    r"|optim\.(lr_mults|freeze|schedule\.(name|warmup|cooldown|end|power|timescale|shift))"
)


def ingredients(settings):
    """The settings that a ledger must have a row for."""
    return {key: value for key, value in settings.items() if INGREDIENTS.fullmatch(key)}


CASES = [
    (name, arguments)
    for name in NAMES
    for arguments in dict.fromkeys(row["arguments"] for row in rows_of(name))
]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_a_recipe_resolves_to_its_ledger(name, arguments):
    rows = [row for row in rows_of(name) if row["arguments"] == arguments]
    assert all(row["source"] and list(row) == COLUMNS for row in rows)
    settings = resolved(name, arguments)
    written = {row["key"]: json.loads(row["value"]) for row in rows}
    assert written == {key: settings.get(key, "no such key") for key in written}
    # A further recipe of the same file lists only what differs from the first.
    if arguments == rows_of(name)[0]["arguments"]:
        assert not ingredients(settings).keys() - written.keys()


# Lines, a table, a section, a figure, a class, or what to look for in the file.
PLACE = re.compile(r"\blines? \d|\b(?:table|section|figure) |\bclass(?:es)? \w|@[0-9a-f]{7}: \S")


@pytest.mark.parametrize("name", NAMES)
def test_a_paper_and_a_file_at_a_commit_come_with_the_place_to_look_at(name):
    sources = {row["source"] for row in rows_of(name)}
    named = {source for source in sources if re.search(r"@[0-9a-f]{7}\b|arXiv:", source)}
    assert {source for source in named if not PLACE.search(source)} == set()


def test_the_page_has_the_tables_of_the_ledgers():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts/recipe_tables.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs/recipes.md").read_text()
    found = page.partition(script.START)[2].partition(script.END)[0].strip()
    assert found == script.tables(), "write them anew: python scripts/recipe_tables.py"


def test_every_published_recipe_has_a_ledger():
    assert {name for name, _ in CASES} == {
        "algoperf_vit", "augreg", "bit_r50_i1k", "deit3", "detect_coco", "dino_s16_i1k",
        "dinov2_l14_i1k", "dinov3_l16_i1k", "finetune", "ijepa_h14_i1k", "lit_coco", "mae_b16_i1k",
        "mixer_b16_i1k", "r26_s32", "segment_ade20k", "simmim_b16_i1k", "strong_i1k", "vit_i1k",
        "vit_i21k", "vit_s16_i1k",
    }  # fmt: skip
