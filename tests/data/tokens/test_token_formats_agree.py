"""The same documents give the same windows, whatever the format of their tokens is."""

import json
import struct

import numpy as np
import pytest
from written_tokens import example, megatron, tfrecord

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.data import open_data
from hybridnorm_jax.data.text.sources import text_corpus
from hybridnorm_jax.data.tokens.token_workers import ThisProcess
from hybridnorm_jax.data.tokens.tokenizers import ByteTokenizer
from hybridnorm_jax.data.tokens.tokenizing import Job, write_tokens

TEXTS = [f"document {number} " * (1 + number % 7) for number in range(60)]
DOCUMENTS = [[*text.encode(), 256] for text in TEXTS]
IDS = np.concatenate([np.array(ids) for ids in DOCUMENTS])


def npy(folder):
    np.save(folder / "a.npy", IDS.astype(np.int32))
    return folder / "a.npy"


def raw(folder):
    (folder / "a.bin").write_bytes(IDS.astype("<u2").tobytes())
    return folder / "a.bin"


def llmc(folder):
    header = struct.pack("<3i", 20240520, 1, len(IDS)).ljust(1024, b"\0")
    (folder / "a.bin").write_bytes(header + IDS.astype("<u2").tobytes())
    return folder / "a.bin"


def megatron_files(folder):
    return megatron(folder, [[ids] for ids in DOCUMENTS], "<i4")


def records(folder):
    (folder / "a.jsonl").write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in DOCUMENTS))
    return folder / "a.jsonl"


def tfrecord_file(folder):
    pytest.importorskip("google_crc32c")
    (folder / "a.tfrecord").write_bytes(tfrecord([example(ids=ids) for ids in DOCUMENTS]))
    return folder / "a.tfrecord"


def array_record(folder):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for ids in DOCUMENTS:
        writer.write(example(ids=ids))
    writer.close()
    return folder / "a.array_record"


def directory(folder):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "out").mkdir()
    job = Job(text_corpus("FILE", [str(folder / "a.jsonl")], "text"), ByteTokenizer(), 0.0, shard_tokens=1024)
    write_tokens(folder / "out", job, ThisProcess(ByteTokenizer()), shown=False)
    return folder / "out"


FORMATS = (npy, raw, llmc, megatron_files, records, tfrecord_file, array_record, directory)


def rows(section):
    train = open_data(section, seq_len=40, vocab_size=257, progress=False).train
    return [{name: values.tolist() for name, values in train[index].items()} for index in range(len(train))]


@pytest.mark.parametrize("packing", ["windows", "documents"])
@pytest.mark.parametrize(
    "write",
    [npy, raw, llmc, megatron_files, records, tfrecord_file, array_record, directory],
    ids=lambda one: one.__name__,
)
def test_every_format_of_tokens_gives_the_windows_of_the_text(tmp_path, write, packing):
    settings = {"validation_fraction": 0.0, "packing": packing, "cache_dir": str(tmp_path / "cache")}
    settings["segment_ids"] = packing == "windows"
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    text = DataSection(source="text", files=(str(tmp_path / "text.jsonl"),), **settings)
    path = str(write(tmp_path))
    tokens = DataSection(source="tokens", files=(path,), separator_id=256, text_field="ids", **settings)
    assert rows(tokens) == rows(text)
