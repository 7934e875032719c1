"""Unknown keys, wrong types and impossible values end with one line that names the key."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.config import changes, default_config, load, parse_arg, schema, set_key, validate
from vit_jax.config.durations import Duration, durations
from vit_jax.errors import UserError


def write_config(path, body):
    path.write_text(
        "from vit_jax.config import default_config\n"
        "def get_config(arg=None):\n"
        "    config = default_config()\n"
        f"    {body}\n"
        "    return config\n"
    )
    return str(path)


def test_defaults_are_valid_and_locked():
    config = validate(default_config())
    assert config.batch_size == 1024
    with pytest.raises(AttributeError, match="batch_size"):
        config.batch_sise = 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.learning_rate", 1, "config.optim.learning_rate is unknown"),
        ("optm.lr", 1, "did you mean config.optim.lr"),
        ("batchsize", 1, "did you mean config.batch_size"),
        ("warmup", 1, "did you mean config.optim.schedule.warmup"),
        ("optim", 1, "is a section"),
    ],
)
def test_unknown_key_suggests_the_nearest(key, value, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        set_key(default_config(), key, value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", "many", "config.batch_size must be of type int"),
        ("batch_size", 0, "must be positive"),
        ("batch_size", True, "must be of type int"),
        ("optim.lr", "high", "config.optim.lr must be of type float"),
        ("accum_steps", 3, "not divisible by config.accum_steps=3"),
        ("ema_decay", 1.5, "config.ema_decay=1.5"),
        ("precision", "medium", "config.precision='medium'"),
        ("total", "90 parsecs", "config.total='90 parsecs' is no duration"),
        ("log.every", "-3", "config.log.every='-3' is no duration"),
        ("data.on_bad_image", "ignore", "write fail or skip"),
        ("mesh.fsdp", 0, "config.mesh.fsdp=0"),
        ("mesh.zero1", 2, "config.mesh.zero1 must be of type bool"),
        ("checkpoint.keep_last", 0, "keep_last"),
        ("eval.sets.val.spilt", "test", "did you mean 'split'"),
    ],
)
def test_impossible_values_name_the_key(key, value, message):
    config = default_config()
    set_key(config, key, value)
    with pytest.raises(UserError) as error:
        validate(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_int_is_accepted_where_a_float_is_meant():
    config = default_config()
    config.optim.lr = 1
    assert validate(config).optim.lr == 1.0


def test_file_overrides_and_arguments(tmp_path):
    path = write_config(tmp_path / "c.py", "config.model.name = arg or 'vit_s16'")
    config = load(f"{path}:vit_b16", {"optim.lr": "3e-4", "model.depth": "2", "total": "5 epochs"})
    assert (config.model.name, config.model.depth) == ("vit_b16", 2)
    assert (config.optim.lr, config.total) == (3e-4, "5 epochs")


def test_bad_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(str(tmp_path / "absent.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="defines no get_config"):
        load(str(tmp_path / "empty.py"))
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match=r"broken\.py:1"):
        load(str(tmp_path / "broken.py"))
    path = write_config(tmp_path / "typo.py", "config.optim.learnig_rate = 3")
    with pytest.raises(UserError, match="unknown key 'learnig_rate'"):
        load(path)


def test_parse_arg():
    arg = parse_arg("S/16,runlocal,lr=0.5", variant="B/16", runlocal=False, lr=1.0)
    assert (arg.variant, arg.runlocal, arg.lr) == ("S/16", True, 0.5)
    assert parse_arg("lr=1", lr=0.1).lr == 1.0
    assert parse_arg(None, a=1).a == 1
    with pytest.raises(UserError, match="did you mean 'runlocal'"):
        parse_arg("runlocl=1", runlocal=False)
    with pytest.raises(UserError, match="must be of type int"):
        parse_arg("n=x", n=1)


@pytest.mark.parametrize(
    ("value", "steps"),
    [(7, 7), ("7", 7), ("7 steps", 7), ("2 epochs", 20), ("0.25ep", 2), ("640 examples", 10),
     ("5 percent", 5), ("5%", 5), ("5.1%", 6), ("0.001%", 1),
     (0, 0), ("0 epochs", 0), ("1_000 steps", 1000)],
)  # fmt: skip
def test_durations(value, steps):
    assert Duration(total=100, batch_size=64, num_examples=640)(value) == steps


@given(st.integers(0, 10**12))
def test_durations_of_whole_steps_are_exact(steps):
    assert Duration(total=1, batch_size=1, num_examples=1)(f"{steps} steps") == steps


def test_total_in_percent_is_refused():
    config = default_config()
    config.total = "50 percent"
    with pytest.raises(UserError, match="percentage of itself"):
        durations(validate(config), 10)


def test_changes_follow_the_schema():
    old = validate(default_config()).to_dict()
    new = validate(default_config())
    new.unlock()
    new.seed, new.optim.lr, new.log.every = 1, 5.0, 10
    new.model.unlock()
    new.model.width, new.model.attention = 8, "xla"
    found = changes(json.loads(json.dumps(old)), new.to_dict())
    assert found["fixed"] == ["model.width: None → 8", "seed: 0 → 1"]
    assert found["warned"] == ["optim.lr: 0.001 → 5.0"]
    assert found["free"] == ["log.every: '1 percent' → 10", "model.attention: None → 'xla'"]


def test_newer_versions_are_refused():
    with pytest.raises(UserError, match="update the package"):
        config_lib.migrate({}, config_lib.VERSION + 1)


def test_stored_config_gains_new_keys_with_their_defaults():
    stored = validate(default_config()).to_dict()
    del stored["max_skipped_steps"]
    stored["model"]["depth"] = 3
    migrated = config_lib.migrate(stored, config_lib.VERSION)
    assert migrated.max_skipped_steps == 0
    assert migrated.model.depth == 3


def test_every_key_is_documented():
    text = config_lib.describe()
    for path, key in schema.walk(schema.SCHEMA):
        assert ".".join(path) in text
        assert key.doc


def test_every_key_is_read_somewhere():
    """No key that does nothing: each leaf's name stands in the code, outside the table of keys."""
    package = Path(config_lib.__file__).parent
    code = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "config.py")
    for path, _ in schema.walk(schema.SCHEMA):
        assert re.search(rf"\b{path[-1]}\b", code), ".".join(path)


def test_config_without_a_section_says_so():
    config = default_config().to_dict()
    del config["optim"]
    with pytest.raises(UserError, match=r"config\.optim is missing"):
        validate(ConfigDict(config))
