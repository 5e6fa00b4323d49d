"""Faults of what is read in which order, of what of it is learned, and of the average of parameters."""

from planted_faults.fault import Fault

DATA_ORDER = (
    Fault(
        name="a_separator_begins_the_next_document",
        file="data/tokens/token_stream.py",
        right="ends = 1 + np.flatnonzero(here == separator_id)",
        wrong="ends = np.flatnonzero(here == separator_id)",
        tests=("data/rows/test_windows.py",),
    ),
    Fault(
        name="every_epoch_has_the_same_order",
        file="data/rows/order.py",
        right="return (self._shuffle_seed + epoch) % 2**32",
        wrong="return self._shuffle_seed",
        tests=("data/test_pipeline.py",),
    ),
    Fault(
        name="tokens_of_a_source_are_those_of_its_first_rows",
        file="data/rows/dealt_tokens.py",
        right="tokens[permuted(places, **keys)]",
        wrong="tokens[places]",
        tests=("data/rows/test_dealt_tokens.py", "data/test_tokens_of_sources.py"),
    ),
    Fault(
        name="tokens_of_a_source_are_a_mean_in_the_metrics",
        file="training/hooks/metrics_lines.py",
        right="mixture.tokens_until(step).items()",
        wrong="((name, amount.mean_tokens) for name, amount in mixture.read_until(step).items())",
        tests=("training/test_mixture_runs.py::test_tokens_of_each_source_are_exact_where_rows_are_not_full",),
    ),
    Fault(
        name="a_later_stage_reads_a_source_from_its_beginning",
        file="data/rows/allotment.py",
        right="dealt.index[places] += self._before[stage][dealt.source[places]]",
        wrong="dealt.index[places] += 0",
        tests=("data/rows/test_allotment.py",),
    ),
    Fault(
        name="the_context_of_a_cut_document_is_scored_twice",
        file="data/rows/packed_rows.py",
        right='row["weights"][begin : begin + context] = 0',
        wrong='row["weights"][begin:begin] = 0',
        tests=("data/rows/test_packed_rows.py",),
    ),
    Fault(
        name="the_mask_of_answers_is_one_token_late",
        file="data/rows/packed_rows.py",
        right="self._stream.targets(start + 1, start + length + 1)",
        wrong="self._stream.targets(start, start + length)",
        tests=("data/test_masked_loss.py", "data/text/test_answers.py"),
    ),
    Fault(
        name="the_average_of_parameters_begins_at_the_first_ones",
        file="training/parameter_average.py",
        right="return jnp.asarray(1 - decay, dtype) / passed",
        wrong="return jnp.asarray(1 - decay, dtype)",
        tests=("training/test_parameter_average.py",),
    ),
)
