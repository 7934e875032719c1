"""Unknown keys, wrong types and impossible values end with one line that names the key."""

import contextlib
import copy
import functools
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.config import changes, default_config, load, parse_arg, schema, set_key, validate
from vit_jax.config.durations import Duration, durations
from vit_jax.errors import UserError


def with_key(key, value):
    config = default_config()
    set_key(config, key, value)
    return config


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
        ("batch_size", "many", "config.batch_size='many': write a whole number"),
        ("batch_size", 0, "config.batch_size=0: write a whole number, at least 1"),
        ("batch_size", True, "config.batch_size=True: write a whole number"),
        ("optim.lr", "high", "config.optim.lr='high': write a number, at least 0"),
        ("accum_steps", 3, "not divisible by config.accum_steps=3"),
        ("ema_decay", 1.5, "config.ema_decay=1.5"),
        ("ema_decay", 1.0, "config.ema_decay=1.0"),
        ("spikes.factor", 1.0, "config.spikes.factor=1.0: write a number, above 1, or 0"),
        ("data.timeout", 0.0, "config.data.timeout=0.0: write a number, above 0"),
        ("precision", "medium", "config.precision='medium'"),
        ("total", "90 parsecs", "config.total='90 parsecs' is no duration"),
        ("log.every", "-3", "config.log.every='-3' is no duration"),
        (
            "data.on_bad_image",
            "ignore",
            "config.data.on_bad_image='ignore' is unknown; valid: fail, skip",
        ),
        ("mesh.fsdp", 0, "config.mesh.fsdp=0"),
        ("mesh.zero1", 2, "config.mesh.zero1=2: write true or false"),
        ("checkpoint.keep_last", 0, "keep_last"),
        ("eval.batch_size", -4, "config.eval.batch_size=-4: write a whole number, at least 0"),
        ("mesh.data", 0, "write a whole number, at least 1, or -1"),
        ("spikes.factor", 0.5, "config.spikes.factor=0.5: write a number, above 1, or 0"),
        ("optim.lr", float("nan"), "config.optim.lr=nan"),
        ("optim.lr", float("inf"), "config.optim.lr=inf"),
        ("optim.lr", 10**400, "config.optim.lr=1000"),
        ("batch_size", 2**31, "config.batch_size=2147483648"),
        ("seed", -1, "config.seed=-1: write a whole number, at least 0 and at most 4294967295"),
        ("total", 0, "config.total=0: write a duration, above 0"),
        ("total", "1e999999999 steps", "is no duration"),
        ("total", "9" * 5000, "is no duration"),
        ("optim.schedule.timescale", "0 epochs", "write a duration, above 0"),
        ("optim.schedule.boundaries", ["3", "x"], "config.optim.schedule.boundaries='x' is no"),
        ("optim.schedule.factors", [0.1, -1], "write a list of numbers, at least 0"),
        ("optim.freeze", [3], "config.optim.freeze=[3]: write a list of texts"),
        ("optim.lr_mults", [["x", "2"]], "write a list of [a text, a number]"),
        ("optim.lr_mults", [["(", 2]], "config.optim.lr_mults: '(' is not a regular expression"),
        ("optim.decay_mask", "(", "config.optim.decay_mask: '(' is not a regular expression"),
        ("optim.group_schedules", [["x", {"nam": 1}]], "config.optim.group_schedules[0].nam is"),
        ("init.source_grid", [0, 4], "write a list of whole numbers, at least 1"),
        ("init.head", "kept", "config.init.head='kept' is unknown; did you mean 'keep'"),
        ("eval.sets.val.pp", 3, "config.eval.sets.val.pp=3: write a text"),
        ("eval.sets.val.spilt", "test", "did you mean 'split'"),
        ("eval.probes.neighbors", [5], "config.eval.probes.split is missing"),
        ("eval.probes.neighbours", 5, "did you mean 'neighbors'"),
        ("eval.probes.split", 3, "config.eval.probes.split=3: write a text"),
    ],
)
def test_impossible_values_name_the_key(key, value, message):
    with pytest.raises(UserError) as error:
        validate(with_key(key, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_evaluations_never_share_a_name():
    config = default_config()
    config.eval.sets.val_ema = {}
    assert set(validate(config).eval.sets) == {"val", "val_ema"}
    config.ema_decay = 0.9
    with pytest.raises(UserError, match=r"config.eval.sets.val_ema: the metrics of the averaged"):
        validate(config)


def test_code_in_place_of_a_section_is_not_trusted():
    with pytest.raises(UserError, match=r"config.json names code .*: config.eval=os:system"):
        config_lib.check_trust({"eval": "os:system"}, "config.json")


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
    with pytest.raises(UserError, match=r"config\.optim has no key 'learnig_rate'"):
        load(path)


@pytest.mark.parametrize("path", ["optim.schedule.wamup", "batch_sise", "data.evalpp"])
@pytest.mark.parametrize("make", [default_config, lambda: validate(default_config())])
def test_a_typo_in_python_is_one_line_with_the_nearest_key(path, make):
    *parents, key = path.split(".")
    section = functools.reduce(getattr, parents, make())
    for access in (
        lambda: setattr(section, key, 1),
        lambda: getattr(section, key),
        lambda: section[key],
        lambda: section.__setitem__(key, 1),
    ):
        with pytest.raises((AttributeError, KeyError)) as error:
            access()
        where = ".".join(["config", *parents])
        assert str(error.value).startswith(f"{where} has no key {key!r}; did you mean")
    assert not hasattr(section, key)
    assert section.get(key, 5) == 5


def test_a_config_can_be_copied():
    config = default_config()
    config.optim.lr = 0.5
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert config.copy_and_resolve_references().optim.lr == 0.5


@pytest.mark.parametrize(
    ("written", "root", "n"),
    [
        ('"my, photos",n=2', "my, photos", 2),
        ("root='a,b=c',n=2", "a,b=c", 2),
        ('n=2,root="it\'s, here"', "it's, here", 2),
        ("it's,n=2", "it's", 2),
        ('a"b', 'a"b', 1),
        ('"a=b"', "a=b", 1),
        ('root=""', "", 1),
    ],
)
def test_values_with_commas_are_quoted(written, root, n):
    arg = parse_arg(written, root="", n=1)
    assert (arg.root, arg.n) == (root, n)


def test_a_shell_that_removed_the_quotes_is_told_of():
    hint = r"""' photos' is unknown; .* quotes, .*: '--config=CONFIG:"my, photos"'\)"""
    with pytest.raises(UserError, match=hint):
        parse_arg("my, photos", root="", n=1)
    with pytest.raises(UserError, match=r"'m' is unknown; valid: n, root$"):
        parse_arg("my,m=2", root="", n=1)


def test_parse_arg():
    arg = parse_arg("S/16,runlocal,lr=0.5", variant="B/16", runlocal=False, lr=1.0)
    assert (arg.variant, arg.runlocal, arg.lr) == ("S/16", True, 0.5)
    assert parse_arg("lr=1", lr=0.1).lr == 1.0
    assert parse_arg(None, a=1).a == 1
    with pytest.raises(UserError, match="did you mean 'runlocal'"):
        parse_arg("runlocl=1", runlocal=False)
    with pytest.raises(UserError, match="must be of type int"):
        parse_arg("n=x", n=1)


class OneLine(Exception):
    """A `UserError` of one line was raised."""


@contextlib.contextmanager
def one_line():
    try:
        yield
    except UserError as error:
        if len(str(error).splitlines()) == 1 and len(str(error)) < 2000:
            raise OneLine from error
        raise


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=6,
)
PATHS = [".".join(path) for path, _ in schema.walk(schema.SCHEMA)]
DEEP = ["-" * 3000 + "1", "[" * 3000, "(" * 300 + ")" * 300, "{" * 90 + "}" * 90, "9" * 5000]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.sampled_from([*PATHS, "model.width", "task.name", "eval.sets.val", "init.initialise"])
    | st.text(),
    st.text() | LITERALS.map(repr) | st.sampled_from(DEEP),
)
def test_any_override_gives_a_config_or_one_line(key, text):
    config = default_config()
    with contextlib.suppress(OneLine), one_line():
        config_lib.apply_overrides(config, {key: text})
        assert json.dumps(validate(config).to_dict())


@settings(deadline=None)
@given(st.text())
def test_any_text_as_a_config_file_gives_one_line(text):
    with pytest.raises(UserError) as error:
        load(text)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.optim.lr = 1 / 0", r"fails \(ZeroDivisionError: division by zero, .*c\.py:4\)"),
        ("import nowhere_at_all", r"No module named 'nowhere_at_all'"),
        ("config['optm'] = 3", r"config has no key 'optm'; did you mean 'optim'"),
    ],
)
def test_a_config_file_that_fails_is_told_in_one_line(tmp_path, body, message):
    with pytest.raises(UserError, match=message) as error:
        load(write_config(tmp_path / "c.py", body))
    assert "\n" not in str(error.value)


def test_a_renamed_key_keeps_its_earlier_name(tmp_path):
    path = write_config(tmp_path / "c.py", "config.init.initialise = ['head/.*']")
    assert (
        load(path).init.to_dict() == load(path, {"init.initialize": "['head/.*']"}).init.to_dict()
    )
    assert load(path, {"init.initialise": "['x']"}).init.initialize == ["x"]
    assert "initialise" not in load(path).init
    stored = validate(default_config()).to_dict()
    stored["init"]["initialise"] = [*stored["init"].pop("initialize"), "y"]
    migrated = config_lib.migrate(stored, config_lib.VERSION)
    assert migrated.init.initialize == ["y"]
    assert "initialise" not in migrated.init
    assert validate(ConfigDict(stored)).init.initialize == ["y"]


def test_a_change_of_one_default_config_leaves_the_next_alone():
    default_config().optim.freeze.append("head/.*")
    assert default_config().optim.freeze == []


@pytest.mark.parametrize("stored", [[], 3, "x", {"optim": 3}, {"seed": {"a": 1}}, {"eval": []}])
def test_a_stored_config_that_is_broken_is_told_in_one_line(stored):
    with pytest.raises(UserError):
        validate(config_lib.migrate(stored, 1))


@pytest.mark.parametrize(
    ("value", "steps"),
    [(7, 7), ("7", 7), ("7 steps", 7), ("2 epochs", 20), ("0.25ep", 2), ("640 examples", 10),
     ("5 percent", 5), ("5%", 5), ("5.1%", 6), ("0.001%", 1),
     (0, 0), ("0 epochs", 0), ("1_000 steps", 1000)],
)  # fmt: skip
def test_durations(value, steps):
    assert Duration(total=100, batch_size=64, num_examples=640)(value) == steps


@given(st.integers(1, 10**6), st.integers(0, 10**4), st.sampled_from([1, 10, 100, 1000]))
def test_durations_are_exact_in_every_unit(total, amount, divisor):
    """1.1 percent of 100,000 steps is 1,100, though 1.1 is no number that a computer stores."""
    text = (
        f"{amount // divisor}.{amount % divisor:0{len(str(divisor)) - 1}d}" if divisor > 1 else ""
    )
    text = text or str(amount)
    exact = Fraction(amount, divisor)
    clock = Duration(total=total, batch_size=7, num_examples=700)
    assert clock(f"{text} percent") == max(math.ceil(exact * total / 100), amount > 0)
    assert clock(f"{text} epochs") == max(round(exact * 100), amount > 0)
    assert clock(f"{text} examples") == max(round(exact / 7), amount > 0)
    assert clock(f"{text}") == max(round(exact), amount > 0)
    assert Duration(100_000, 1, 1)("1.1 percent") == 1100


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
    package = Path(config_lib.__file__).parents[1]
    code = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "schema.py")
    for path, _ in schema.walk(schema.SCHEMA):
        assert re.search(rf"\b{path[-1]}\b", code), ".".join(path)


def test_config_without_a_section_says_so():
    config = default_config().to_dict()
    del config["optim"]
    with pytest.raises(UserError, match=r"config\.optim is missing"):
        validate(ConfigDict(config))
