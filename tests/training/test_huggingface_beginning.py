"""A run that begins with a Hugging Face directory is the run that begins with a run of the same parameters."""

import dataclasses

import jax
import numpy as np
import pytest

import hybridnorm_jax as hn
from hybridnorm_jax.interop.huggingface import save_huggingface
from hybridnorm_jax.training import loop

SHORT = {"steps": 2, "batch_size": 4, "seq_len": 16, "log_every": 1, "sample_tokens": 0}


@pytest.fixture
def config(tmp_path, small_config):
    (tmp_path / "text.txt").write_text("alpha beta gamma delta " * 60)
    default = hn.RunConfig()
    return hn.RunConfig(
        run=dataclasses.replace(default.run, dir=str(tmp_path / "runs")),
        model=small_config(vocab_size=257, scheme="span", num_layers=2),
        data=dataclasses.replace(
            default.data,
            **{"source": "text", "files": (str(tmp_path / "text.txt"),), "cache_dir": str(tmp_path / "cache")},
            validation_fraction=0,
        ),
        train=dataclasses.replace(default.train, **SHORT),
        mesh=dataclasses.replace(default.mesh, data=2, fsdp=2, tensor=2),
    )


def _beginning_with(config, name, path):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name), init_from=str(path))


# With other numbers that norms start at it is no other model.
DERF = {"norm": "derf", "norm_alpha": (0.8, 0.2, 0.2), "norm_shift": (0.1,), "learned_embedding_scale": True}


@pytest.mark.parametrize("keys", [{}, pytest.param(DERF, marks=pytest.mark.long)], ids=["rmsnorm", "derf"])
def test_it_trains_on_as_from_a_run(keys, config, tmp_path, random_params):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **keys))
    params = random_params(config.model)
    save_huggingface(tmp_path / "exported", config.model, params)
    hn.save_run(str(tmp_path / "run"), config, params)
    trained = []
    heir = dataclasses.replace(config, model=dataclasses.replace(config.model, norm_alpha=(), norm_shift=()))
    for source in ("exported", "run"):
        loop.train(_beginning_with(heir, f"from_{source}", tmp_path / source))
        trained.append(hn.load_run(str(tmp_path / "runs" / f"from_{source}"))[1])
    jax.tree.map(np.testing.assert_array_equal, *trained)
    assert not np.array_equal(trained[0]["head"]["kernel"], params["head"]["kernel"])


def test_another_model_and_the_optimizer_are_refused_by_name(config, tmp_path, random_params):
    save_huggingface(tmp_path / "exported", config.model, random_params(config.model))
    heir = _beginning_with(config, "heir", tmp_path / "exported")
    other = dataclasses.replace(heir, model=dataclasses.replace(config.model, scheme="post"))
    with pytest.raises(
        hn.UserError, match=r"belong to another model \(model.scheme: .*exported has span, asked post\)"
    ):
        loop.train(other)
    # Of a deeper model the scheme places other norms, and it is not the scheme that differs.
    deeper = dataclasses.replace(heir, model=dataclasses.replace(config.model, num_layers=config.model.num_layers + 1))
    with pytest.raises(hn.UserError, match=r"another model \(model.num_layers: .*exported has \d, asked \d\)"):
        loop.train(deeper)
    with pytest.raises(hn.UserError, match=r"init_optimizer=true: .*exported is a Hugging Face directory, without an"):
        loop.train(dataclasses.replace(heir, init_optimizer=True))
