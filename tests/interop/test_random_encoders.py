"""Random tiny models of every class of encoders against transformers, as test_random_architectures.py has decoders."""

import dataclasses
import zlib

import jax
import numpy as np
import pytest
from drawn_encoders import DRAWS
from test_vision import outputs_of
from transformers_models import drawn_parameters, in_float64

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import ARCHITECTURES, mathematics

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# Models of each class.
NUMBERS = range(3)
# Of outputs in float64, relative to the largest of them: EXACT of test_random_architectures.py.
EXACT = 1e-12


def inputs_of(keys, rng):
    """As transformers takes them, and as we do."""
    if "vocab_size" in keys:
        tokens = rng.integers(3, keys["vocab_size"], (3, 9))
        tokens[0, 3] = tokens[0, 6] = keys["eos_token_id"]
        return {"input_ids": torch.from_numpy(tokens)}, tokens.astype(np.int32)
    size = keys["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    pixels = rng.standard_normal((2, keys["num_channels"], height, width))
    return {"pixel_values": torch.from_numpy(pixels)}, np.moveaxis(pixels, 1, 3)


def exact_outputs(model, inputs):
    """What transformers' class gives, in float64."""
    given = dict(model.named_parameters())
    with in_float64(), torch.no_grad():
        exact = type(model)(model.config).eval()
        for name, parameter in exact.named_parameters():
            parameter.copy_(given[name])
        return {name: array.numpy() for name, array in exact(**inputs).items()}


def ours(directory, inputs):
    """What we give, in float64."""
    with jax.enable_x64(True):
        config, params = hn.load_huggingface(directory, dtype="float64")
        model = hn.build_model(dataclasses.replace(config, dtype="float64"))
        outputs = outputs_of(jax.jit(model.apply)({"params": params}, inputs))
        return {name: np.asarray(array) for name, array in outputs.items()}


def assert_exact(found, expected, keys):
    for name, array in found.items():
        difference = np.abs(array - expected[name]).max() / max(1.0, np.abs(expected[name]).max())
        assert difference < EXACT, (name, keys)


def test_every_class_is_drawn():
    encoders = [each for each in ARCHITECTURES.values() if each.config_class is hn.EncoderConfig]
    assert set(DRAWS) == {name for each in encoders for name in (each.classes or (each.class_name,))}


@pytest.mark.long
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("class_name", DRAWS)
def test_a_random_encoder_is_read_exactly_and_written_back(tmp_path, class_name, number):
    seed = zlib.crc32(f"{class_name} {number}".encode())
    rng = np.random.default_rng(seed)
    keys = DRAWS[class_name](rng)
    cls = getattr(transformers, class_name)
    model = drawn_parameters(cls(cls.config_class(**keys, attn_implementation="eager")), seed)
    model.save_pretrained(tmp_path / "theirs")
    theirs, inputs = inputs_of(keys, rng)
    expected = exact_outputs(model, theirs)
    found = ours(tmp_path / "theirs", inputs)
    assert set(found) == {name for name in ("logits", "last_hidden_state", "pooler_output") if name in expected}
    assert_exact(found, expected, keys)
    config, params = hn.load_huggingface(tmp_path / "theirs")
    hn.save_huggingface(tmp_path / "ours", config, params)
    again, back = hn.load_huggingface(tmp_path / "ours")
    assert mathematics(again) == mathematics(config)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    reread = cls.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert_exact({name: exact_outputs(reread, theirs)[name] for name in found}, expected, keys)
