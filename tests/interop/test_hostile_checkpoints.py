"""Directories made to harm: what lies outside of them is not opened, and few bytes take neither memory nor time."""

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hybridnorm_jax as hn
from hybridnorm_jax.interop.checkpoint_files import parse_json
from hybridnorm_jax.interop.huggingface import load_huggingface

GOLDENS = Path(__file__).parents[1] / "goldens"
SHARDED = "hf_olmo2_bf16_sharded"
FIRST_SHARD = "model-00001-of-00003.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path):
    """A copy of a golden's config.json and weights."""

    def make(name="hf_llama"):
        directory = tmp_path / name
        ignore = shutil.ignore_patterns("golden*", "generation_config.json")
        shutil.copytree(GOLDENS / name, directory, ignore=ignore)
        for file in directory.iterdir():
            file.chmod(0o644)
        return directory

    return make


def refused(directory):
    """The message of the refusal: one line that names a file of the directory; little memory was taken on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(hn.UserError) as raised:
            load_huggingface(directory)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    message = str(raised.value)
    assert message.startswith(str(directory))
    assert message.isprintable()
    return message.removeprefix(str(directory) + "/")


# ---- Which files may be opened

OUTSIDE = "a symbolic link that leaves the directory; put a copy of the file in its place"


@pytest.mark.parametrize(("name", "file"), [("hf_llama", "config.json"), ("hf_llama", WEIGHTS), (SHARDED, INDEX)])
def test_a_link_that_leaves_the_directory_is_not_followed(copy, tmp_path, name, file):
    directory = copy(name)
    (directory / file).rename(tmp_path / "elsewhere")
    for target in (tmp_path / "elsewhere", "../elsewhere", "/etc/passwd", "/dev/zero"):
        (directory / file).symlink_to(target)
        assert refused(directory) == f"{file}: {OUTSIDE}"
        (directory / file).unlink()


def test_a_shard_may_not_be_a_link_out_of_the_directory(copy, tmp_path):
    directory = copy(SHARDED)
    (directory / FIRST_SHARD).rename(tmp_path / "elsewhere")
    (directory / FIRST_SHARD).symlink_to(tmp_path / "elsewhere")
    assert refused(directory) == f"{FIRST_SHARD}: {OUTSIDE}"


def test_a_link_inside_the_directory_and_one_to_the_directory_are_followed(copy, tmp_path):
    directory = copy()
    (directory / WEIGHTS).rename(directory / "weights")
    (directory / WEIGHTS).symlink_to("weights")
    (tmp_path / "link").symlink_to(directory)
    assert load_huggingface(tmp_path / "link")[0].d_model == 32


def test_the_cache_of_hugging_faces_tools_is_read(copy, tmp_path):
    """Its files are links into a directory beside."""
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(copy(SHARDED).iterdir())):
        file.rename(cache / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_huggingface(snapshot)[0].d_model == 32
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../elsewhere")
    (tmp_path / "elsewhere").write_text("{}")
    assert refused(snapshot) == f"config.json: {OUTSIDE}"


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_what_is_no_file_is_refused(copy, file):
    directory = copy()
    (directory / file).unlink()
    os.mkfifo(directory / file)
    assert refused(directory) == f"{file}: must be a regular file"
    (directory / file).unlink()
    (directory / file).mkdir()
    assert refused(directory) == f"{file}: must be a regular file"
    (directory / file).rmdir()
    (directory / file).symlink_to(file)
    assert refused(directory).startswith(f"{file}: cannot be read: ")
    (directory / file).unlink()
    (directory / file).symlink_to("nothing")
    assert refused(directory).startswith(f"{file}: no such file")


@pytest.mark.parametrize(("name", "file"), [("hf_llama", "config.json"), ("hf_llama", WEIGHTS), (SHARDED, FIRST_SHARD)])
def test_a_pointer_of_git_lfs_is_called_one(copy, name, file):
    directory = copy(name)
    (directory / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")
    assert refused(directory) == (
        f"{file}: a pointer of git-lfs, not the file itself; run `git lfs pull` in {directory}"
    )


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_a_pickle_is_refused_with_what_would_be_right(copy, suffix):
    directory = copy()
    (directory / WEIGHTS).rename(directory / f"model{suffix}")
    assert refused(directory).endswith("a pickle, which can run any code and is never read; convert it to safetensors")


# ---- The index

INDEX_NAMES = ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", "..", "", "x\n.safetensors"]


@pytest.mark.parametrize("file", INDEX_NAMES)
def test_an_index_names_files_beside_it_alone(copy, file):
    directory = copy(SHARDED)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    (directory / INDEX).write_text(json.dumps(index))
    message = refused(directory)
    assert message.startswith(f"{INDEX}: weight_map.lm_head.weight=")
    assert message.endswith("must be the name of a file beside it that ends in .safetensors")


# ---- JSON

WRONG_JSON = {
    '{"hidden_size": ' + "9" * 5000 + "}": "hidden_size: an integer of 5,000 digits",
    '{"a": {"b": [1, ' + "9" * 5000 + "]}}": "a.b: an integer of 5,000 digits",
    '{"x": 1, "deep": ' + "[" * 100_000 + "]" * 100_000 + "}": "deep: nested too deeply",
    '{"x": 1, "deep": ' + '{"a":' * 100_000 + "1" + "}" * 100_001: "deep: nested too deeply",
    '{"x": 1, "deep": ' + "[" * 60 + "]" * 60 + "}": "deep: nested too deeply",
    '{"rms_norm_eps": NaN}': "rms_norm_eps: NaN is no number of JSON",
    '{"a": {"b": -Infinity}}': "a.b: -Infinity is no number of JSON",
    '{"hidden_size": 32, "hidden_size": 64}': "hidden_size: stated twice",
    '{"rope_parameters": {"rope_theta": 3, "rope_theta": 4}}': "rope_parameters.rope_theta: stated twice",
    '{"a\\nb": 1, "a\\nb": 1}': "a\\nb: stated twice",
    "NaN": "its value: NaN is no number of JSON",
    "": "cannot be read as JSON",
    "{": "cannot be read as JSON",
    "\ufeff{}": "cannot be read as JSON: begins with a byte order mark; save it as UTF-8 without one",
    "\ud800": "cannot be read as JSON",
}


@pytest.mark.parametrize("text", WRONG_JSON, ids=lambda text: text[:25])
def test_json_that_cannot_be_used_is_refused_by_its_key(text):
    with pytest.raises(hn.UserError) as raised:
        parse_json(text.encode(errors="surrogatepass"), "config.json")
    assert str(raised.value).startswith(f"config.json: {WRONG_JSON[text]}")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("value", [[], "text", 3, None, {}, True, [{"model_type": "llama"}]], ids=repr)
def test_a_config_that_is_no_mapping_or_empty(copy, value):
    directory = copy()
    (directory / "config.json").write_text(json.dumps(value))
    assert refused(directory).startswith("config.json: ")


SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
VALUES = [2**31 - 1, 10**400, -1, "32", True, [32]]


@pytest.mark.parametrize("key", [*SIZES, "intermediate_size", "rms_norm_eps", "rope_theta", "hidden_act"])
def test_a_key_of_a_wrong_type_or_size_is_refused_at_once(copy, key):
    directory = copy()
    document = json.loads((directory / "config.json").read_text())
    document.pop("rope_parameters")
    for value in VALUES:
        if key in ("rms_norm_eps", "rope_theta") and value == 2**31 - 1:
            continue  # odd, but possible
        (directory / "config.json").write_text(json.dumps(document | {key: value}))
        refused(directory)


def test_as_many_positions_as_there_are_integers(copy):
    directory = copy("hf_opt")
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(document | {"max_position_embeddings": 2**31 - 1}))
    assert refused(directory) == "config.json: max_position_embeddings=2147483647 is out of range"


# ---- The header of a safetensors file


def entry(start, stop, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HALF = entry(0, 32, [8])
HEADERS = {
    "overlapping": {"a": entry(0, 64, [16]), "b": entry(32, 64, [8])},
    "the same bytes twice": {"a": entry(0, 64, [16]), "b": entry(0, 64, [16])},
    "a hole": {"a": HALF, "b": entry(48, 64, [4])},
    "bytes left over": {"a": HALF},
    "beyond the end": {"a": entry(0, 128, [32])},
    "backwards": {"a": entry(64, 0, [16])},
    "a negative size": {"a": entry(0, 64, [-16])},
    "a product that overflows": {"a": entry(0, 64, [2**62, 2**62])},
    "a product that overflows to nothing": {"a": entry(0, 0, [2**40, 2**40, 0]), "b": entry(0, 64, [16])},
    "another size": {"a": entry(0, 64, [15])},
    "no dtype": {"a": entry(0, 64, [16], "F31")},
    "a dtype of half bytes": {"a": entry(0, 64, [128], "F4")},
    "no entry": {"a": 3},
    "a list": [1],
    "metadata that are none": {"__metadata__": {"a": 1}, "a": entry(0, 64, [16])},
    "an unknown name": {"a\n\x1b[31mb": entry(0, 64, [16])},
    "a long name": {"a" * 100_000: entry(0, 64, [16])},
    "nothing of a size that is everything": {"a": entry(0, 0, [0, 2**63 - 1]), "b": entry(0, 64, [16])},
    "hundreds of dimensions": {"a": entry(0, 64, [16] + [1] * 300)},
    "a huge integer": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,64]}}',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "no JSON": b"\x80\x04\x95",
    "a name twice": b'{"a":{"dtype":"F16","shape":[32],"data_offsets":[0,64]},'
    b'"a":{"dtype":"BF16","shape":[32],"data_offsets":[0,64]}}',
}


def _write(file, header, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(64))


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(copy, name):
    directory = copy()
    _write(directory / WEIGHTS, HEADERS[name])
    message = refused(directory)
    assert message.startswith(WEIGHTS) or " is in no file, but config.json asks for it" in message
    assert len(message) < 600


def test_a_name_that_is_there_twice_is_named(copy):
    directory = copy()
    _write(directory / WEIGHTS, HEADERS["a name twice"])
    assert refused(directory) == f"{WEIGHTS}: header: a: stated twice"


@pytest.mark.parametrize("length", [0, 3, 99_000_000, 2**32, 2**63, 2**64 - 1])
def test_a_header_that_claims_any_length_takes_no_memory(copy, length):
    directory = copy()
    _write(directory / WEIGHTS, b"{}", length)
    assert refused(directory).startswith(WEIGHTS)


def test_a_tensor_of_the_right_shape_and_no_bytes(copy):
    """Its place in the file is what the library checks, not the sizes that config.json claims."""
    directory = copy()
    arrays = load_file(directory / WEIGHTS)
    header, offset = {}, 0
    for name, array in sorted(arrays.items()):
        stop = offset if name == "lm_head.weight" else offset + array.nbytes
        header[name] = entry(offset, stop, list(array.shape))
        offset = stop
    text = json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    assert refused(directory).startswith(f"{WEIGHTS}: damaged or cut off: ")


def test_a_tensors_name_is_shown_on_one_line(copy):
    directory = copy()
    arrays = load_file(directory / WEIGHTS)
    save_file(arrays | {"a\n\x1b[31mb": np.ones(3, np.float32)}, directory / WEIGHTS)
    assert "a\\n\\x1b[31mb" in refused(directory)
