"""Megatron's .bin and .idx: written here as its documentation says, read back as tokens and documents."""

import struct

import numpy as np
import pytest
from written_tokens import CODES, megatron

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import DataError, open_data
from hybridnorm_jax.data.tokens.token_files import open_token_file
from hybridnorm_jax.data.tokens.token_stream import Extent, TokenStream

DOCUMENTS = [[[5, 6, 7, 0]], [[8, 0]], [[9, 10], [11, 12, 0]], [[]], [[13, 14, 15, 16, 17, 18, 0]]]
TOKENS = [token for document in DOCUMENTS for sequence in document for token in sequence]
ENDS = [4, 6, 11, 18]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("modes", [b"", bytes(6)])
def test_the_index_says_the_type_of_the_tokens_and_where_documents_end(tmp_path, dtype, modes):
    file = open_token_file(megatron(tmp_path, DOCUMENTS, dtype, modes=modes), "uint16")
    assert file.dtype == np.dtype(dtype)
    assert file[:].tolist() == TOKENS
    assert np.asarray(file.ends).tolist() == ENDS


def test_documents_end_where_the_index_says_and_not_at_separators(tmp_path):
    file = open_token_file(megatron(tmp_path, DOCUMENTS), "uint16")
    stream = TokenStream((Extent(file, "a", 0, len(file), ends=file.ends),), 100)
    assert np.concatenate(list(stream.document_ends(None))).tolist() == ENDS
    part = TokenStream((Extent(file, "a", 5, 13, ends=file.ends),), 100)
    assert np.concatenate(list(part.document_ends(None))).tolist() == [1, 6, 8]


def test_a_run_reads_it_without_being_told_the_type(tmp_path):
    path = megatron(tmp_path, [[[*range(1, 40), 0]] * 1 for _ in range(50)])
    data = open_data(
        DataSection(source="tokens", files=(str(path),), separator_id=0, segment_ids=True, validation_fraction=0.0),
        seq_len=60,
        vocab_size=50,
    )
    row = data.train[0]
    assert row["tokens"].tolist() == [*range(1, 40), 0, *range(1, 21)]
    assert row["segment_ids"].tolist() == [1] * 40 + [2] * 20


@pytest.mark.parametrize("separator_id", [None, 1])
def test_documents_are_kept_apart_where_the_index_says_without_any_separator(tmp_path, separator_id):
    """An id that is no separator here ends nothing either."""
    path = str(megatron(tmp_path, [[[1, 2, 3]], [[1, 5]], [[6, 1, 8]]] * 3))
    section = DataSection(
        source="tokens",
        files=(path,),
        separator_id=separator_id,
        segment_ids=True,
        validation_fraction=0.0,
        validation={"train": (path,)},
    )
    data = open_data(section, seq_len=8, vocab_size=50, progress=False)
    for rows in (data.train, data.validation["train"]):
        assert rows[0]["segment_ids"].tolist() == [1, 1, 1, 2, 2, 3, 3, 3]
        assert rows[0]["positions"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
        assert rows[0]["weights"].tolist() == [1, 1, 0, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_tokens_of_a_validation_set_need_a_separator_too_where_documents_matter(tmp_path, packing):
    path = str(megatron(tmp_path, DOCUMENTS))
    np.save(tmp_path / "bare.npy", np.arange(20, dtype="<u2"))
    section = DataSection(
        source="tokens",
        files=(path,),
        segment_ids=True,
        packing=packing,
        validation_fraction=0.0,
        validation={"other": (str(tmp_path / "bare.npy"),)},
    )
    with pytest.raises(DataError, match=r"^data\.separator_id=null: .* \(data\.validation\.other\): the id that ends"):
        open_data(section, seq_len=8, vocab_size=50, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bin_, idx: idx.write_bytes(idx.read_bytes()[:20]), r"a\.idx: truncated"),
        (lambda bin_, idx: idx.write_bytes(idx.read_bytes()[:-9]), r"a\.idx: damaged or truncated"),
        (lambda bin_, idx: bin_.write_bytes(bin_.read_bytes()[:-4]), r"a\.bin: has 68 bytes, but a\.idx .* says 72"),
        (lambda bin_, idx: idx.write_bytes(idx.read_bytes()[:9] + b"\x02" + idx.read_bytes()[10:]), "version 2"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, change, message):
    path = megatron(tmp_path, DOCUMENTS)
    change(path, path.with_suffix(".idx"))
    with pytest.raises(DataError, match=message):
        open_token_file(path, "uint16")


@pytest.mark.parametrize(("code", "message"), [(7, "its tokens are floats"), (77, r"not known \(77\)")])
def test_tokens_that_are_no_integers_are_refused(tmp_path, code, message):
    with pytest.raises(DataError, match=message):
        open_token_file(megatron(tmp_path, DOCUMENTS, code=code), "uint16")


def test_an_index_whose_documents_do_not_follow_each_other_is_refused_where_they_matter(tmp_path):
    path = megatron(tmp_path, DOCUMENTS)
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[34:38] = struct.pack("<i", 3)  # the first sequence is one token shorter
    index.write_bytes(content)
    file = open_token_file(path, "uint16")
    with pytest.raises(DataError, match="do not follow each other"):
        np.asarray(file.ends)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),  # as a download that was cut off leaves it
        (b"MMID", "truncated"),
        (b"TNTIDX\x00\x00" + bytes(40), "older format TNTIDX"),
        (b"<html>404</html>", r"no index of Megatron's.* if a\.bin holds raw numbers, move a\.idx away"),
    ],
    ids=["empty", "cut off", "older", "foreign"],
)
def test_without_its_index_a_bin_file_is_not_taken_for_raw_numbers(tmp_path, content, message):
    """As uint16, every second id of the int32 tokens would be 0."""
    path = megatron(tmp_path, DOCUMENTS)
    path.with_suffix(".idx").write_bytes(content)
    with pytest.raises(DataError, match=rf"^\S*a\.idx: [^\n]*{message}"):
        open_token_file(path, "uint16")


def test_the_index_itself_is_no_tokens(tmp_path):
    path = megatron(tmp_path, DOCUMENTS)
    with pytest.raises(DataError, match=r"name its \.bin file only"):
        open_token_file(path.with_suffix(".idx"), "uint16")
