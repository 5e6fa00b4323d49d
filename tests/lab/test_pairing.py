"""Two runs of one seed are a pair: the same draws and the same data; anything else is refused."""

import json

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab.pairing import FILE, check_paired, digest, obstacle, parameter_samples, read_record
from hybridnorm_jax.training.state import init_params

PRECISION = float(np.finfo(np.float32).eps)
SIZES = {"vocab_size": 61, "d_model": 16, "num_layers": 3, "num_heads": 2, "mlp_dim": 16}


def _record(scheme, seed=0, batch=0, **keys):
    config = hn.ModelConfig(scheme=scheme, **{**SIZES, **keys})
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(seed))
    tokens = np.full((1, 2, 4), batch)
    return {"parameters": parameter_samples(config, params), "batches": {"1": digest({"tokens": tokens})}}


def test_schemes_of_one_seed_draw_the_same_numbers_whatever_their_initializer_and_grouping():
    pre, star = _record("pre"), _record("hybrid_star")  # one group of layers, and two
    shared = pre["parameters"].keys() & star["parameters"].keys()
    assert {name.partition("/")[0] for name in shared} >= {"0", "2", "head", "token_embedding"}
    assert obstacle(pre, star, precision=PRECISION) is None
    assert obstacle(_record("pre", initializer="megatron"), star, precision=PRECISION) is None


def test_another_seed_is_no_pair_and_another_width_has_nothing_to_compare():
    one, other = _record("pre"), _record("pre", seed=1)
    assert obstacle(one, other, precision=PRECISION).startswith("they begin with other numbers in 0/attention/key/kern")
    wider = _record("pre", d_model=32)
    assert not one["parameters"].keys() & wider["parameters"].keys()


def test_a_directory_with_other_data_is_refused(tmp_path):
    for name, batch in (("a", 0), ("b", 1), ("c", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_text(json.dumps(_record("pre", batch=batch)))
    check_paired([tmp_path / "a", tmp_path / "c"], precision=PRECISION)
    with pytest.raises(UserError, match=r"a and .*b have the same seed, but they read other data in step 1"):
        check_paired([tmp_path / "a", tmp_path / "c", tmp_path / "b"], precision=PRECISION)
    (tmp_path / "a" / FILE).write_text("{}")
    with pytest.raises(UserError, match=r"pairing\.json: must hold the maps parameters and batches"):
        read_record(tmp_path / "a")
    for damaged in ('"ab"', "[1, 2, 3, 4]", '["x"]', "null"):
        (tmp_path / "a" / FILE).write_text(f'{{"batches": {{}}, "parameters": {{"head": {damaged}}}}}')
        with pytest.raises(UserError, match=r"pairing\.json: parameters must map each matrix to at most 3 numbers"):
            read_record(tmp_path / "a")
