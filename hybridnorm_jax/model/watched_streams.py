"""What is watched of the streams between blocks, and how they are split over devices there."""

from flax import linen as nn

from hybridnorm_jax.model.formula import Stream, Streams
from hybridnorm_jax.model.norm_functions import padding_defect, zero_mean_defect
from hybridnorm_jax.model.signal_measures import PROBE, SIGNAL, gradient_probe, stream_rms, token_similarity

# Collections that Block and Decoder fill where an invariant check makes them mutable; nothing is computed otherwise.
# So it is with SIGNAL and PROBE, of signal_measures.py.
STREAM, DEFECT = "stream", "stream_defect"
# And so it is with those that MoE fills.
ROUTER, CHOSEN = "router", "chosen"


def constrained(streams: Streams) -> Streams:
    """The streams, split over devices by batch and sequence."""

    def split(x: Stream) -> Stream:
        return nn.with_logical_constraint(x, ("batch", "seq", None))

    return Streams(main=split(streams.main), side=None if streams.side is None else split(streams.side))


def watch_streams(module: nn.Module, streams: Streams) -> Streams:
    """`watch_stream` of both streams; what is said of the side stream has names that begin with side_."""
    main, side = streams
    main = watch_stream(module, main)
    return Streams(main=main, side=None if side is None else watch_stream(module, side, prefix="side_"))


def watch_stream(module: nn.Module, stream: Stream, prefix: str = "") -> Stream:
    """Sow what is wanted of the stream, and return the stream.

    Of the collections that are mutable, STREAM gets the stream, DEFECT its zero_mean_defect (with norm_width its
    padding_defect), and SIGNAL what signal_measures says of it. Where PROBE has a place for it, the gradient of the
    stream that is returned is measured.

    Args:
      module: a Block or the Decoder; it has a `config`.
      prefix: of the names of what is sown and measured.
    """
    if module.is_initializing():  # where every collection is
        return stream
    if module.is_mutable_collection(STREAM):
        module.sow(STREAM, f"{prefix}value", stream)
    if module.is_mutable_collection(DEFECT):
        width = module.config.norm_width
        defect = zero_mean_defect(stream) if width is None else padding_defect(stream, width)
        module.sow(DEFECT, f"{prefix}value", defect)
    if module.is_mutable_collection(SIGNAL):
        module.sow(SIGNAL, f"{prefix}stream_rms", stream_rms(stream))
        module.sow(SIGNAL, f"{prefix}token_similarity", token_similarity(stream))
    if module.has_variable(PROBE, f"{prefix}square"):
        stream = gradient_probe(stream, module.get_variable(PROBE, f"{prefix}square"))
    return stream
