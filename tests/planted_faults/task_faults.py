"""Faults in how texts and their continuations are scored."""

from planted_faults.fault import Fault

TASKS = (
    Fault(
        name="targets_beside_their_own_inputs",
        file="evaluation/token_requests.py",
        right="inputs=tokens[max(end - 1 - window, 0) : end - 1]",
        wrong="inputs=tokens[max(end - window, 0) : end]",
        tests=("evaluation/test_token_requests.py",),
    ),
    Fault(
        name="one_token_of_the_window_is_not_used",
        file="evaluation/token_requests.py",
        right="inputs=tokens[max(end - 1 - window, 0) : end - 1]",
        wrong="inputs=tokens[max(end - window, 0) : end - 1]",
        tests=("evaluation/test_token_requests.py",),
    ),
    Fault(
        name="a_second_separator",
        file="evaluation/text_requests.py",
        right="if tokens[:1] == [separator]:",
        wrong="if not tokens:",
        tests=("evaluation/test_token_requests.py",),
    ),
    Fault(
        name="whitespace_stays_with_the_context",
        file="evaluation/text_requests.py",
        right="return stripped, context[len(stripped) :] + continuation",
        wrong="return context, continuation",
        tests=("evaluation/test_token_requests.py",),
    ),
    Fault(
        name="a_continuation_tokenized_by_itself",
        file="evaluation/text_requests.py",
        right="rest = whole[len(begin) :]",
        wrong="rest = tokenizer.encode(continuation)",
        tests=("evaluation/test_token_requests.py",),
    ),
    Fault(
        name="greedy_where_one_token_is",
        file="evaluation/token_scores.py",
        right="(is_greedy | ~is_target).all(-1)",
        wrong="(is_greedy & is_target).any(-1)",
        tests=("evaluation/test_token_scores.py",),
    ),
    Fault(
        name="scores_in_the_order_of_their_lengths",
        file="evaluation/token_scores.py",
        right="sums[row.request] += float(likelihood)",
        wrong="sums[batch.rows.index(row)] += float(likelihood)",
        tests=("evaluation/test_token_scores.py",),
    ),
    Fault(
        name="what_an_earlier_row_predicted_counts_again",
        file="data/rows/windows.py",
        right="""row["weights"][: self._seq_len - self._stride] = 0""",
        wrong="pass",
        tests=("data/rows/test_windows.py",),
    ),
)
