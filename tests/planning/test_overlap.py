"""What runs beside a collective is read from the order of the instructions in the text."""

from hybridnorm_jax.planning.overlap import read_overlap

TEXT = """HloModule m, is_scheduled=true, num_partitions=8

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %start = (f32[1]{0}, f32[8]{0}) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %work = f32[8]{0} copy(%x)
  %done = f32[8]{0} all-gather-done(%start)
  %idle = f32[8]{0} all-reduce-start(%work), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
  %free = f32[8]{0} bitcast(%work)
  %idle_done = f32[8]{0} all-reduce-done(%idle)
  ROOT %next = (s32[], f32[8]) tuple(%i, %done)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %more = pred[] constant(true)
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], f32[8]) tuple(%zero, %x)
  %loop = (s32[], f32[8]) while(%first), condition=%condition, body=%body
  %last = f32[8]{0} get-tuple-element(%loop), index=1
  ROOT %whole = f32[8]{0} all-reduce(%last), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_a_collective_without_work_before_its_end_is_alone():
    overlap = read_overlap(TEXT)
    assert overlap.collectives == 3
    assert overlap.alone == ["idle", "whole"]
