"""Where a continuation begins, what of it is read at once, and that each of its tokens is a target exactly once."""

import numpy as np
import pytest

from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer
from hybridnorm_jax.evaluation.text_requests import before_first, beginning, continuations, documents
from hybridnorm_jax.evaluation.token_requests import Piece, Request, pieces

END = ByteTokenizer.separator_id


class Pairs(ByteTokenizer):
    """Two equal letters beside each other are one token."""

    def encode(self, text):
        ids, letters = [], list(text)
        while letters:
            first = letters.pop(0)
            is_pair = letters[:1] == [first]
            ids.append(ord(first) + (300 if is_pair else 0))
            del letters[: int(is_pair)]
        return np.array(ids, np.int32)


def _ids(text):
    return list(text.encode())


@pytest.mark.parametrize("window", [4, 5, 7, 20])
@pytest.mark.parametrize("stride", [None, 1, 3])
@pytest.mark.parametrize(("context", "continuation"), [(1, 1), (1, 20), (3, 9), (9, 3), (30, 2), (30, 30), (2, 0)])
def test_every_token_is_a_target_once_after_the_tokens_before_it(window, stride, context, continuation):
    tokens = list(range(100, 100 + context + continuation))
    request = Request(tokens[:context], tokens[context:])
    rows = list(pieces(request, window=window, stride=stride))
    assert [target for row in rows for target in row.targets] == tokens[context:]
    for row in rows:
        assert 1 <= len(row.targets) <= len(row.inputs) <= window
        # The token after the last input is the last target.
        assert list(row.inputs) == list(range(row.inputs[0], row.targets[-1]))
    if stride is not None:
        assert all(len(row.inputs) == window and len(row.targets) <= stride for row in rows[1:])


def test_a_continuation_that_fits_is_one_row_whose_context_is_cut_in_front():
    request = Request([1, 2, 3, 4, 5], [6, 7])
    assert list(pieces(request, window=9)) == [Piece([1, 2, 3, 4, 5, 6], [6, 7])]
    # The window holds inputs: the last target needs none.
    assert list(pieces(request, window=3)) == [Piece([4, 5, 6], [6, 7])]
    assert list(pieces(request, window=2)) == [Piece([5, 6], [6, 7])]


def test_a_whole_text_is_cut_as_the_harness_cuts_it():
    rows = list(pieces(Request([END], list(range(10))), window=4))
    assert rows == [
        Piece([END, 0, 1, 2], [0, 1, 2, 3]),
        Piece([3, 4, 5, 6], [4, 5, 6, 7]),
        Piece([5, 6, 7, 8], [8, 9]),
    ]


def test_whitespace_at_the_end_of_a_context_belongs_to_the_continuation():
    pairs = [("a b ", "c"), ("a b", " c"), ("a \n", "\tc")]
    requests = continuations(ByteTokenizer(), pairs, separator=END)
    assert requests[0] == requests[1] == Request(_ids("a b"), _ids(" c"))
    assert requests[2] == Request(_ids("a"), _ids(" \n\tc"))


def test_the_separator_stands_in_front_of_an_empty_context_only_and_once():
    pairs = [("", "ab"), ("  ", "ab"), ("a", "b")]
    requests = continuations(ByteTokenizer(), pairs, separator=END)
    assert requests[0] == Request([END], _ids("ab"))
    assert requests[1] == Request([END], _ids("  ab"))
    assert requests[2] == Request(_ids("a"), _ids("b"))
    assert documents(ByteTokenizer(), ["ab", ""], separator=END) == [Request([END], _ids("ab")), Request([END], [])]
    # A tokenizer that puts it there itself is not given a second one.
    assert beginning(np.array([END, 1, 2]), END) == Request([END], [1, 2])
    assert beginning(np.array([1, END, 2]), END) == Request([END], [1, END, 2])


def test_the_boundary_is_that_of_the_tokens_of_both_together():
    # "aa" is one token of the whole. What is left after as many tokens as the context has is scored, as by the harness.
    (request,) = continuations(Pairs(), [("ba", "ac")], separator=None)
    assert request == Request(_ids("ba"), _ids("c"))
    # Nothing would be left: then it is the continuation by itself, and not a continuation without tokens.
    (request,) = continuations(Pairs(), [("a", "a")], separator=None)
    assert request == Request(_ids("a"), _ids("a"))


def test_an_answer_ends_before_the_first_of_its_stop_strings():
    assert before_first("one two three", ["three", "tw"]) == "one "
    assert before_first("one", ["", "x"]) == "one"
    assert before_first("one", []) == "one"


def test_of_stop_strings_that_overlap_the_one_named_first_decides():
    """As the harness cuts, one after another: "\n\nQ:" is no more in what "Q:" has left."""
    assert before_first("four\n\nQ: five", ["Q:", "\n\nQ:"]) == "four\n\n"
    assert before_first("four\n\nQ: five", ["\n\nQ:", "Q:"]) == "four"
