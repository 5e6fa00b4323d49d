"""model.remat=auto is the policy that computes least again among those that fit."""

import dataclasses

import jax
import numpy as np
import pytest

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.model.config import REMAT_POLICIES
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.training import remat_choice
from hybridnorm_jax.training.loop import train
from hybridnorm_jax.training.memory import Memory, compile_within_memory
from hybridnorm_jax.training.remat_choice import ORDER, checked_program, compiled_program, least_room, with_chosen_remat

# What the step of each policy is said to need.
NEEDED = {"none": 1000, "dots": 800, "dots_no_batch": 600, "all_but_attention": 400, "full": 200}


def run_config(small_config, remat, **model):
    default = RunConfig()
    return dataclasses.replace(
        default,
        model=small_config(scheme="pre", remat=remat, **model),
        train=dataclasses.replace(default.train, batch_size=8, seq_len=64),
    )


@pytest.fixture
def tried(monkeypatch):
    """The policies that were compiled, where each needs what NEEDED says; "dots" ends for lack of memory at once."""
    policies, build = [], remat_choice.Program

    def program(config, mesh=None, *, remat=None):
        policies.append(config.model.remat if remat is None else remat)
        return build(config, mesh, remat=remat)

    def memory(executable, platform):
        return Memory(arguments=NEEDED[policies[-1]], outputs=0, aliased=0, temporaries=0, generated_code=0)

    monkeypatch.setattr(remat_choice, "Program", program)
    monkeypatch.setattr(remat_choice, "memory_of", memory)
    return policies


def compile_all_but_dots(policies):
    return lambda lowered: (None, "no room") if policies[-1] == "dots" else (lowered, None)


@pytest.mark.parametrize(
    ("room", "chosen"),
    [
        pytest.param(1053, "none", marks=pytest.mark.long),
        (1052, "dots_no_batch"),
        pytest.param(632, "dots_no_batch", marks=pytest.mark.long),
        (631, "all_but_attention"),
    ],
)
def test_the_first_policy_that_fits_is_taken(small_config, tried, room, chosen):
    config = run_config(small_config, "auto")
    found = compiled_program(config, room=room, compile_step=compile_all_but_dots(tried))
    assert found.program.remat == found.program.model.config.remat == chosen
    assert tried == list(ORDER[: ORDER.index(chosen) + 1])
    assert (found.memory.peak, found.refusal) == (NEEDED[chosen], None)


def test_where_none_fits_it_is_the_one_that_keeps_least(small_config, tried):
    config = run_config(small_config, "auto")
    assert compiled_program(config, room=100, compile_step=compile_all_but_dots(tried)).program.remat == "full"


def test_a_named_policy_is_taken_whatever_it_needs(small_config, tried):
    config = run_config(small_config, "dots_no_batch")
    found = compiled_program(config, room=1, compile_step=compile_all_but_dots(tried))
    assert (found.program.remat, tried) == ("dots_no_batch", ["dots_no_batch"])


def test_a_device_that_does_not_say_how_much_it_has_needs_a_name(small_config, monkeypatch):
    config = run_config(small_config, "auto")
    monkeypatch.setattr(remat_choice, "room_of", lambda device: None)
    with pytest.raises(ConfigError, match=r"^model\.remat=auto: this device does not say .*; name a policy$"):
        with_chosen_remat(checked_program(config))


def test_a_program_with_a_named_policy_stays(small_config, tried):
    program = checked_program(run_config(small_config, "dots"))
    assert with_chosen_remat(program) is program
    assert tried == ["dots"]


@pytest.mark.parametrize(("others", "least"), [((700, 500), 500), ((0, 700), None)])
def test_the_process_with_the_least_room_decides(monkeypatch, others, least):
    """All processes ask, one that does not know its room as well: otherwise the others would wait for it."""
    said = []

    def gather(mine):
        said.append(int(mine))
        return np.array([mine, *others])

    monkeypatch.setattr(remat_choice.jax, "process_count", lambda: 3)
    monkeypatch.setattr(remat_choice.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(remat_choice, "room_of", lambda device: 600)
    assert least_room() == least
    monkeypatch.setattr(remat_choice, "room_of", lambda device: None)
    assert least_room() is None
    assert said == [600, 0]


def test_data_that_are_not_there_are_missed_before_policies_are_tried(small_config, monkeypatch, tmp_path):
    config = run_config(small_config, "auto")
    data = dataclasses.replace(config.data, source="tokens", files=(str(tmp_path / "nowhere.npy"),))
    monkeypatch.setattr(remat_choice, "compiled_program", None)
    with pytest.raises(UserError, match=r"nowhere\.npy"):
        train(dataclasses.replace(config, data=data, run=dataclasses.replace(config.run, dir=str(tmp_path / "runs"))))


def test_every_policy_is_tried():
    assert sorted(ORDER) == sorted(REMAT_POLICIES)


@pytest.mark.long  # four steps are compiled
def test_what_the_compiler_says_decides(small_config):
    """Really compiled: the step that keeps everything needs more than the one that keeps a block's input."""
    config = run_config(small_config, "auto", num_layers=8)
    needed = {
        policy: compiled_program(run_config(small_config, policy, num_layers=8), room=None).memory.peak
        for policy in ("none", "full")
    }
    assert needed["full"] < 0.9 * needed["none"]
    compiled = []

    def compile_step(lowered):
        compiled.append(lowered)
        return compile_within_memory(lowered)

    found = compiled_program(config, room=int(needed["none"] / remat_choice.SHARE) - 1, compile_step=compile_step)
    assert found.program.remat != "none"
    assert len(compiled) == 1 + ORDER.index(found.program.remat)
    room = int(needed["none"] / remat_choice.SHARE) + 2
    assert compiled_program(config, room=room).program.remat == "none"


def test_a_decoder_by_itself_computes_nothing_again(small_config, tokens):
    model = Decoder(small_config(remat="auto"))
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    text = str(jax.make_jaxpr(jax.grad(lambda p: model.apply(p, tokens).sum()))(params))
    assert "checkpoint" not in text
