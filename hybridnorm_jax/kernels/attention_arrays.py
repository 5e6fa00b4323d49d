"""The arrays that attention takes and keeps."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

Heads = Float[Array, "batch seq heads head_dim"]
KeyValueHeads = Float[Array, "batch seq kv_heads head_dim"]
SegmentIds = Int[Array, "batch seq"] | None


class AttentionInputs(NamedTuple):
    """What causal attention is computed from; query head h reads key and value head h // (heads / kv_heads).

    Attributes:
      query, key, value: of one dtype.
      segment_ids: the number of each position's document; None where every sequence is one document.
    """

    query: Heads
    key: KeyValueHeads
    value: KeyValueHeads
    segment_ids: SegmentIds


class AttentionResiduals(NamedTuple):
    """What a backward pass needs.

    Attributes:
      inputs: of the forward pass.
      context: its result.
      log_total: the logarithm of the softmax's denominator, for each query and head, in float32 at least.
    """

    inputs: AttentionInputs
    context: Heads
    log_total: Array
