"""Bytes read from HLO text: kinds, groups, loops, what TPUs do in steps."""

# ruff: noqa: E501 (HLO is written in long lines)

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.parallel.sharding import make_mesh
from vit_jax.planning.hlo import Program

# Two layers of a loop that gathers a kernel in a ring, both ways, two steps an iteration.
RING = """HloModule step, num_partitions=8

%condition (p: (u32[], f32[4,4])) -> pred[] {
  %p = (u32[], f32[4,4]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %n = u32[] constant(8)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (p.1: (u32[], f32[4,4])) -> (u32[], f32[4,4]) {
  %p.1 = (u32[], f32[4,4]) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=0
  %x.1 = f32[4,4]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %two = u32[] constant(2)
  %i.2 = u32[] copy(%i.1)
  %next = u32[] add(%i.2, %two)
  %send = (f32[4,4]{1,0}, f32[4,4]{1,0}, u32[], u32[]) collective-permute-start(%x.1), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %done = f32[4,4]{1,0} collective-permute-done(%send)
  ROOT %out = (u32[], f32[4,4]) tuple(%next, %done)
}

ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4] parameter(0)
  %zero = u32[] constant(0)
  %start = (u32[], f32[4,4]) tuple(%zero, %x)
  %loop = (u32[], f32[4,4]) while(%start), condition=%condition, body=%body
  ROOT %y = f32[4,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def only(line):
    """The collective of a program of one line."""
    text = f"HloModule m, num_partitions=8\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n"
    (found,) = Program(text).collectives()
    return found


def test_loops_are_multiplied_out_by_bound_and_step():
    (ring,) = Program(RING).collectives()
    assert (ring.kind, ring.times, ring.sent) == ("collective-permute", 4, 64)
    assert ring.total_sent == 256


def test_a_loop_may_begin_after_zero():
    (ring,) = Program(RING.replace("constant(0)", "constant(2)")).collectives()
    assert ring.times == 3


def test_a_collective_that_several_fusions_run_counts_as_often_as_the_rarest():
    """All of them name its channel, and some are in the loops of others."""
    loop, again = "  %loop = ", "  %again = (f32[4,4]{1,0}, f32[4,4]{1,0}) "
    again += "collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}\n"
    for text in (RING.replace(loop, again + loop), RING.replace("  ROOT %y", again + "  ROOT %y")):
        (ring,) = Program(text).collectives()
        assert ring.times == 1


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=8] {'a':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_every_form_of_groups(groups, size):
    line = f"%g = bf16[64,16]{{1,0}} all-gather(%x), channel_id=3, replica_groups={groups}"
    found = only(line)
    assert found.group_size == size
    assert found.sent == 64 * 16 * 2 * (size - 1) / size


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        ("all-reduce", 2 * 4096 * 7 / 8),
        ("reduce-scatter", 4096 * 7),
        ("all-to-all", 4096 * 7 / 8),
        ("collective-permute", 4096),
    ],
)
def test_bytes_sent_by_each_kind(operation, sent):
    found = only(f"%y = f32[1024]{{0}} {operation}(%x), channel_id=1, replica_groups=[1,8]<=[8]")
    assert found.sent == sent


@pytest.mark.parametrize(
    ("shape", "received"),
    [
        ("(f32[128]{0}, f32[1024]{0}, u32[], u32[])", 4096),
        ("((f32[128]{0}, f32[64]{0}), (f32[1024]{0}, f32[512]{0}))", 6144),
    ],
)
def test_operands_and_flags_of_started_operations_do_not_count(shape, received):
    assert only(f"%s = {shape} all-gather-start(%x, %y), channel_id=1").bytes == received


def test_sum_whose_parts_stay_apart_is_a_reduce_scatter():
    text = """HloModule m, num_partitions=4

%all-reduce-scatter.1 (x: f32[256]) -> f32[64] {
  %r = f32[256]{0} all-reduce(%x), channel_id=2, replica_groups={{0,1,2,3}}
}

ENTRY %main (x: f32[256]) -> f32[64] {
  ROOT %f = f32[64]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (found,) = Program(text).collectives()
    assert (found.kind, found.sent) == ("all-reduce-scatter", 1024 * 3 / 4)


BESIDE = """HloModule m, num_partitions=4

%async_collective_fusion.1 (x: f32[256]) -> f32[1024] {
  %inside = f32[1024]{0} all-gather(%x), channel_id=3, dimensions={0}
}

ENTRY %main (x: f32[256], w: f32[1024]) -> f32[1024] {
  %s = (f32[256]{0}, f32[1024]{0}) all-gather-start(%x), channel_id=1, dimensions={0}
  %c = f32[1024]{0} fusion(%w), kind=kLoop, calls=%square
  %d = f32[1024]{0} all-gather-done(%s)
  %t = (f32[256]{0}, f32[1024]{0}) all-gather-start(%x), channel_id=2, dimensions={0}
  %e = f32[1024]{0} all-gather-done(%t)
  %g = f32[1024]{0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %moved = f32[1024]{0} copy(%g)
  %near = f32[1024]{0:T(256)S(1)} copy(%e)
  ROOT %r = f32[1024]{0} all-reduce(%d), channel_id=4
}
"""


def test_what_is_sent_while_the_device_computes():
    """Begun and ended around a fusion, or inside one; not begun and waited for, or whole."""
    overlapped = [c.is_overlapped for c in Program(BESIDE).collectives()]
    assert overlapped == [True, False, True, False]


def test_what_a_sparse_core_sends():
    text = """HloModule m, num_partitions=4

%called_computation.1 (x: f32[1024]) -> f32[256] {
  ROOT %r = f32[256]{0} reduce-scatter(%x), channel_id=1, dimensions={0}
}

%called_computation.2 (x: f32[256]) -> f32[1024] {
  ROOT %g = f32[1024]{0} all-gather(%x), channel_id=2, dimensions={0}
}

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %s = (f32[1024]{0}, f32[256]{0}) call-start(%x), to_apply=%called_computation.1
  %c = f32[1024]{0} fusion(%x), kind=kLoop, calls=%square
  %d = f32[256]{0} call-done(%s)
  %t = (f32[256]{0}, f32[1024]{0}) call-start(%d), to_apply=%called_computation.2
  ROOT %e = f32[1024]{0} call-done(%t)
}
"""
    scattered, gathered = Program(text).collectives()
    assert (scattered.kind, scattered.is_overlapped) == ("reduce-scatter", True)
    assert (gathered.kind, gathered.is_overlapped) == ("all-gather", False)
    assert scattered.sent == gathered.sent == 1024 * 4 * 3 / 4


def test_kernels_of_a_step():
    kernels = Program(BESIDE).kernels()
    assert (kernels.fusions, kernels.copies, kernels.copied_bytes) == (2, 1, 4096)


def test_transfers_between_slices():
    text = """HloModule m, num_partitions=4

ENTRY %main (x: f32[256]) -> f32[256] {
  %s = (f32[256]{0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
    assert Program(text).sent_between_slices(4) == 2 * 1024 * 3 / 4


def test_what_is_stored_leaves_out_views_and_on_chip_memory():
    text = """HloModule m

ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %a = f32[256]{0:T(256)S(1)} add(%x, %x)
  %b = f32[128,2]{1,0} bitcast(%a)
  ROOT %c = f32[256]{0} multiply(%a, %x)
}
"""
    assert Program(text).stored_bytes() == 1024


def test_fusions_with_flags_store_the_slice_they_replace():
    """As TPUs fuse a layer with a step of a gather: all activations go through, one slice is new."""
    text = """HloModule m

%async_collective_fusion.1 (all: f32[24,256], new: f32[1,256], at: s32[], f: u32[], part: f32[64]) -> f32[24,256] {
  %all = f32[24,256]{1,0} parameter(0)
  %new = f32[1,256]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %f = u32[]{:S(2)} parameter(3)
  %part = f32[64]{0} parameter(4)
  %u = f32[24,256]{1,0} dynamic-update-slice(%all, %new, %at, %at)
  ROOT %t = (f32[24,256]{1,0}, u32[]{:S(2)}, f32[64]{0}) tuple(%u, %f, %part)
}

ENTRY %main (x: f32[24,256]) -> f32[24,256] {
  %g = (f32[24,256]{1,0}, u32[]{:S(2)}, f32[64]{0}) fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  ROOT %y = f32[24,256]{1,0} get-tuple-element(%g), index=0
}
"""
    assert Program(text).stored_bytes() == 1024


def test_a_real_program_with_a_loop():
    """A scan over 6 layers whose kernels are split over 8 devices gathers each once."""
    mesh = make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    split = NamedSharding(mesh, P(None, "fsdp", None))
    rows = NamedSharding(mesh, P("fsdp"))

    def run(x, kernels):
        def layer(x, kernel):
            whole = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, P()))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ whole), rows), None

        return jax.lax.scan(layer, x, kernels)[0]

    shapes = (jnp.zeros((16, 64)), jnp.zeros((6, 64, 64)))
    text = jax.jit(run, in_shardings=(rows, split)).lower(*shapes).compile().as_text()
    gathers = [c for c in Program(text).collectives() if c.kind == "all-gather"]
    assert sum(c.total_sent for c in gathers) == 6 * 64 * 64 * 4 * 7 / 8
