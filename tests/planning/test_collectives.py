"""What a compiled program sends: the collectives of its text, in loops and in the TPU compiler's own forms."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from hybridnorm_jax.planning.collectives import kernels, read_collectives, shape_bytes


def test_shapes_have_bytes():
    assert shape_bytes("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}") == 2048
    assert shape_bytes("(f32[3]{0}, /*index=1*/s4[5], pred[], token[], u32[]{:S(2)})") == 12 + 3 + 1 + 4


def test_collectives_of_a_loop_count_as_often_as_it_runs():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec("data"),) * 2, out_specs=PartitionSpec("data"))
    def send(x, w):
        def layer(x, _):
            whole = jax.lax.all_gather(w, "data", tiled=True)  # changes with x, so that it stays in the loop
            return jnp.tanh(x @ (whole * x[0, 0])), None

        x, _ = jax.lax.scan(layer, x, length=5)
        return jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]) + jax.lax.pmean(x.sum(), "data")

    text = jax.jit(send).lower(jnp.ones((8, 16)), jnp.ones((16, 16))).compile().as_text()
    kinds = read_collectives(text).kinds
    gathers = kinds["all-gather"]
    assert gathers.bytes == gathers.count * 16 * 16 * 4
    assert gathers.count in (1, 5)  # XLA may move it in front of the loop
    assert (kinds["collective-permute"].count, kinds["collective-permute"].bytes) == (1, 16 * 4)
    assert (kinds["all-reduce"].count, kinds["all-reduce"].bytes) == (1, 4)


# What only the TPU compiler writes, shortened from its own text: a loop of 15 whose length stands in its condition, an
# all-gather spread over three fusions, one of them in a loop of 4, and a reduce-scatter as a fusion.
TPU_TEXT = """HloModule jit_train_step, is_scheduled=true

%all-reduce-scatter (input: f32[64,8]) -> f32[64,2] {
  %input = f32[64,8]{1,0} parameter(0)
  ROOT %all-reduce.1 = f32[64,8]{1,0} all-reduce(%input), channel_id=9, to_apply=%add
}

%fused_computation.1 (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8], u32[]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %custom-call.1 = (bf16[2,8], bf16[8,8], u32[]) custom-call(%p, %all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p.2: bf16[2,8]) -> bf16[8,8] {
  %p.2 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0} all-gather(%p.2), channel_id=7, dimensions={0}
}

%fused_computation.3 (p.3: bf16[2,8]) -> bf16[8,8] {
  %p.3 = bf16[2,8]{1,0} parameter(0)
  %all-gather.3 = bf16[8,8]{1,0} all-gather(%p.3), channel_id=7, dimensions={0}
  ROOT %custom-call.3 = bf16[8,8]{1,0} custom-call(%p.3, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%inner_body (inner: (u32[], bf16[2,8])) -> (u32[], bf16[2,8]) {
  %inner = (u32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[] get-tuple-element(%inner), index=0
  %x = bf16[2,8]{1,0} get-tuple-element(%inner), index=1
  %permute = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=3
  %permuted = bf16[2,8]{1,0} collective-permute-done(%permute)
  %goes-on = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  ROOT %out = (u32[], bf16[2,8]) tuple(%next, %permuted)
}

%inner_condition (inner.1: (u32[], bf16[2,8])) -> pred[] {
  %inner.1 = (u32[], bf16[2,8]{1,0}) parameter(0)
  %i.1 = u32[] get-tuple-element(%inner.1), index=0
  %limit = u32[] constant(8)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%body (carried: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %carried = (s32[], bf16[2,8]{1,0}) parameter(0)
  %layer = s32[] get-tuple-element(%carried), index=0
  %y = bf16[2,8]{1,0} get-tuple-element(%carried), index=1
  %starts = (bf16[2,8], bf16[8,8], u32[]) fusion(%y), kind=kCustom, calls=%fused_computation.1
  %zero = u32[] constant(0)
  %start = u32[] copy(%zero)
  %into = (u32[], bf16[2,8]) tuple(%start, %y)
  %while.1 = (u32[], bf16[2,8]) while(%into), condition=%inner_condition, body=%inner_body
  %ends = bf16[8,8]{1,0} fusion(%y), kind=kCustom, calls=%fused_computation.3
  %y.1 = bf16[2,8]{1,0} get-tuple-element(%while.1), index=1
  %one = s32[] constant(1)
  %layer.1 = s32[] add(%one, %layer)
  ROOT %carry = (s32[], bf16[2,8]) tuple(%layer.1, %y.1)
}

%condition (carried.1: (s32[], bf16[2,8])) -> pred[] {
  %carried.1 = (s32[], bf16[2,8]{1,0}) parameter(0)
  %layer.2 = s32[] get-tuple-element(%carried.1), index=0
  %layers = s32[] constant(15)
  ROOT %lt = pred[] compare(%layer.2, %layers), direction=LT
}

ENTRY %main (a: bf16[2,8], g: f32[64,8]) -> f32[64,2] {
  %a = bf16[2,8]{1,0} parameter(0)
  %g = f32[64,8]{1,0} parameter(1)
  %first = s32[] constant(0)
  %init = (s32[], bf16[2,8]) tuple(%first, %a)
  %while.2 = (s32[], bf16[2,8]) while(%init), condition=%condition, body=%body
  %after-all = token[] after-all()
  %send = (f32[64,8]{1,0}, u32[]{:S(2)}, token[]) send(%g, %after-all), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %splash_mha_fwd_residuals.4 = f32[2]{0} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %fusion.11 = f32[64,2]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_the_tpu_compilers_forms_are_read():
    found = read_collectives(TPU_TEXT)
    counted = {kind: (traffic.count, traffic.bytes) for kind, traffic in found.kinds.items()}
    assert counted == {
        "all-gather": (15, 15 * 128),
        "collective-permute": (15 * 4, 15 * 4 * 32),
        "reduce-scatter": (1, 64 * 8 * 4),
        "all-reduce between slices": (1, 64 * 8 * 4),
    }
    assert found.unknown_loops == 0
    assert kernels(TPU_TEXT) == ["splash_mha_fwd_residuals"]
    inside_a_gradient = TPU_TEXT.replace("splash_mha_fwd_residuals", "transpose_jvp_splash_mha_fwd_residuals__")
    assert kernels(inside_a_gradient) == ["splash_mha_fwd_residuals"]


def test_a_loop_of_unknown_length_is_said():
    text = TPU_TEXT.replace("%layers = s32[] constant(15)", "%layers = s32[] get-tuple-element(%carried.1), index=0")
    found = read_collectives(text)
    assert found.unknown_loops == 1
    assert found.kinds["all-gather"].count == 1


def test_what_is_no_program_is_not_read_as_one_without_collectives():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_collectives("HloModule nothing")


IN_A_LOOP = """HloModule m, num_partitions=8

%body (p: (s32[], f32[4,8], f32[32,8])) -> (s32[], f32[4,8], f32[32,8]) {
  %p = (s32[], f32[4,8]{1,0}, f32[32,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %all = f32[32,8]{1,0} all-gather(%x), channel_id=1, replica_groups=GROUPS, dimensions={0}, \
metadata={op_name="jit(train_step)/jvp(Decoder.hidden)/while/body/run_0/attention/dot_general"}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[4,8]{1,0}, f32[32,8]{1,0}) tuple(%next, %x, %all)
}

%condition (p.1: (s32[], f32[4,8], f32[32,8])) -> pred[] {
  %p.1 = (s32[], f32[4,8]{1,0}, f32[32,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %nine = s32[] constant(9)
  ROOT %less = pred[] compare(%i.1, %nine), direction=LT
}

ENTRY %main (x: f32[4,8], y: f32[32,8]) -> f32[32,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[32,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %in = (s32[], f32[4,8]{1,0}, f32[32,8]{1,0}) tuple(%zero, %x, %y)
  %loop = (s32[], f32[4,8]{1,0}, f32[32,8]{1,0}) while(%in), condition=%condition, body=%body
  %z = f32[32,8]{1,0} get-tuple-element(%loop), index=2
  ROOT %sum = f32[32,8]{1,0} all-reduce(%z), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}
"""
WHOLE = 32 * 8 * 4


def test_an_all_gather_in_a_loop_is_sent_as_often_as_it_turns():
    found = read_collectives(IN_A_LOOP.replace("GROUPS", "{}"))
    gather, reduce = found.sent
    assert (gather.kind, gather.part, gather.bytes, gather.times) == ("all-gather", "layers forward", WHOLE, 9)
    assert (reduce.kind, reduce.bytes, reduce.times) == ("all-reduce", WHOLE, 1)
    # Of eight devices each sends 7/8 of the whole, of two that sum twice a half.
    assert found.links == (9 * WHOLE * 7 / 8 + WHOLE, 0)
    assert found.unknown_loops == 0


@pytest.mark.parametrize(
    ("groups", "inside", "between"),
    [
        # Two nodes of four: half of the whole comes into each node, where four share it; within it 3/4 go round.
        ("{}", WHOLE * 3 / 4, WHOLE / 2 / 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", 0, WHOLE / 2),
        ("{{0,1,2,3},{4,5,6,7}}", WHOLE * 3 / 4, 0),
    ],
)
def test_what_goes_between_nodes_is_told_apart(groups, inside, between):
    found = read_collectives(IN_A_LOOP.replace("GROUPS", groups), nodes=[0, 0, 0, 0, 1, 1, 1, 1])
    assert found.links == (9 * inside + WHOLE, 9 * between)


def test_of_an_all_to_all_every_device_sends_its_own_between_nodes():
    text = IN_A_LOOP.replace("all-gather(%x)", "all-to-all(%x)").replace("GROUPS", "{}")
    found = read_collectives(text, nodes=[0, 0, 0, 0, 1, 1, 1, 1])
    assert found.links == (9 * WHOLE * 3 / 4 / 2 + WHOLE, 9 * WHOLE / 2)
