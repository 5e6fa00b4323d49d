"""Keys that nothing reads are said, no others are, and no configuration that is shipped has one."""

import pytest

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.named_configurations import find, names
from hybridnorm_jax.config.unread_keys import unread_keys

MIXTURE = "data.mixture={a: {source: stdlib}}"


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        (("optimizer.name=lion", "optimizer.eps=1e-6"), ["optimizer.eps=1e-06 has no effect with optimizer.name=lion"]),
        (
            ("optimizer.name=adafactor", "optimizer.b1=0.5"),
            ["optimizer.b1=0.5 has no effect with optimizer.name=adafactor"],
        ),
        (
            ("optimizer.schedule=constant", "optimizer.final_ratio=0.3"),
            ["optimizer.final_ratio=0.3 has no effect with optimizer.schedule=constant"],
        ),
        (
            ("optimizer.schedule=cosine", "optimizer.wsd_decay=cosine", "optimizer.wsd_decay_fraction=0.5"),
            [
                "optimizer.wsd_decay_fraction=0.5 has no effect with optimizer.schedule=cosine",
                "optimizer.wsd_decay=cosine has no effect with optimizer.schedule=cosine",
            ],
        ),
        (("optimizer.schedule=wsd", "optimizer.wsd_decay=cosine", "optimizer.wsd_decay_fraction=0.5"), []),
        (("data.fim_spm_rate=0.1",), ["data.fim_spm_rate=0.1 has no effect with data.fim_rate=0"]),
        (("data.mixture_unit=documents",), ["data.mixture_unit=documents has no effect with data.mixture={}"]),
        ((MIXTURE, "data.mixture_unit=documents"), []),
        (
            ("optimizer.balance_bias_rate=0.01",),
            ["optimizer.balance_bias_rate=0.01 has no effect with model.balance_bias=false"],
        ),
    ],
)
def test_a_key_without_effect_is_said_with_the_key_that_decides_so(keys, lines):
    assert unread_keys(parse(["quickstart", *keys])) == lines


@pytest.mark.parametrize("name", names())
def test_no_configuration_that_is_shipped_has_one(name):
    needs_files = "source: tokens" in find(name).read_text()
    assert unread_keys(parse([name, *(["data.files=[a.npy]"] if needs_files else [])])) == []
