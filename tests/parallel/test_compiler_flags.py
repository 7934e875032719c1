"""The compiler knows every option of the table, and refuses one that it does not know."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from vit_jax.parallel import accelerators, compiler_flags
from vit_jax.parallel.sharding import make_mesh
from vit_jax.planning.target import Target

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"
)
SMALLEST = {"v2": "2x2", "v3": "2x2", "v5e": "2x2", "v6e": "2x2"}


def compile_something(generation, extra=None):
    devices = Target.find(f"{generation}:{SMALLEST.get(generation, '2x2x1')}").devices
    mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, devices)
    options = compiler_flags.for_mesh(mesh) | (extra or {})
    where = jax.NamedSharding(mesh, jax.P("data"))
    argument = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=where)
    jax.jit(lambda x: x.sum()).lower(argument).compile(compiler_options=options)
    return options


def test_no_options_off_tpus():
    assert compiler_flags.for_mesh(make_mesh({"data": 8, "fsdp": 1, "tensor": 1})) == {}


@needs_libtpu
@pytest.mark.parametrize("generation", accelerators.TPUS)
def test_the_compiler_knows_every_option(generation):
    assert compile_something(generation) == dict(accelerators.TPUS[generation].compiler_options)


@needs_libtpu
def test_the_compiler_refuses_an_unknown_option():
    with pytest.raises(Exception, match="xla_tpu_go_faster"):
        compile_something("v5e", {"xla_tpu_go_faster": True})
