"""Who takes part in a collective, in each notation of XLA's text, and which of them are in other nodes."""

import pytest

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.planning.device_groups import groups_of
from hybridnorm_jax.planning.hlo_text import Instruction

TWO_NODES = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("groups", "size", "nodes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4, 1),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2, 2),
        ("replica_groups={}", 8, 2),
        ("replica_groups=[2,4]<=[8]", 4, 1),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, 2),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}", 4, 1),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", 2, 2),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", 8, 2),
        ("replica_groups=mesh['y'=8] {'y':(1)2}", 2, 2),  # the outer half of y
        ("replica_groups=mesh['y'=8] {'y':(2)4}", 4, 1),
        ("replica_groups=mesh['y'=4,'x'=2], device_ids=([2,4]T(1,0)) {'y'}", 4, 1),
        ("replica_groups=mesh['y'=4,'x'=2], device_ids=([2,4]T(1,0)) {'x'}", 2, 2),
        ("replica_groups=mesh['y'=2,'x'=4], device_ids=(0,4,1,5,2,6,3,7) {'x'}", 4, 2),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 2, 1),
        ("source_target_pairs={{0,1},{3,4},{7,0}}", 2, 2),
    ],
)
def test_every_notation_is_read(groups, size, nodes):
    collective = Instruction("c", "f32[8]", "all-gather", "%x", f", channel_id=1, {groups}, dimensions={{0}}", False)
    assert groups_of(collective, TWO_NODES) == (size, nodes)


@pytest.mark.parametrize("groups", ["replica_groups=@mesh {'x'}", "replica_groups=mesh['x'=2], device_ids=(?) {'x'}"])
def test_an_unknown_notation_is_refused(groups):
    collective = Instruction("c", "f32[8]", "all-gather", "%x", f", channel_id=1, {groups}", False)
    with pytest.raises(UserError, match="the groups of %c"):
        groups_of(collective, TWO_NODES)
