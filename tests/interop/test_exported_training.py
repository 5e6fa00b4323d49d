"""Our PyTorch code is compiled, trained and fine-tuned."""

import shutil

import numpy as np
import pytest
from covering import others_are_long
from exported_models import (
    TOKENS,
    config_of,
    export,
    ids,
    in_torch,
    left_padded,
    logits_of,
    torch,
    transformers,
    written,
)

import hybridnorm_jax as hn


@pytest.mark.parametrize(
    "name",
    others_are_long(
        ["hybrid_star", "span", "experts_with_all", "learned_positions", "dyt", "derf", "gated"],
        ["experts_with_all", "derf", "gated"],
    ),
)
def test_the_forward_pass_is_one_graph(model_of, fresh_compiler, name):
    model = model_of(name)
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    np.testing.assert_allclose(logits_of(graph), logits_of(model), rtol=0, atol=1e-5)
    tokens, mask = left_padded([TOKENS[0], TOKENS[1, :5]])
    padded = logits_of(graph, tokens, attention_mask=mask)
    np.testing.assert_allclose(padded, logits_of(model, tokens, attention_mask=mask), rtol=0, atol=1e-5)


@pytest.mark.long
def test_one_graph_serves_every_length(model_of, fresh_compiler):
    """torch takes a second length as a sign that the length is a symbol."""
    model = model_of("span")
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (3, 5, 12):
        tokens, mask = left_padded([TOKENS[0, :length], TOKENS[1, : length - 1]])
        for given in (None, mask):
            found, expected = (logits_of(each, tokens, attention_mask=given) for each in (graph, model))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_shapes_are_known_without_memory(exported):
    config = transformers.AutoConfig.from_pretrained(exported("learned_positions").directory, trust_remote_code=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        assert model(torch.zeros((2, 5), dtype=torch.long)).logits.shape == (2, 5, 61)


@pytest.mark.parametrize("name", ["span", "experts_with_all", "gated"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(model_of, name, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = model_of(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids(TOKENS), labels=ids(TOKENS)).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for path, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][path], gradient, rtol=1e-5, atol=1e-7)


def test_the_router_is_not_rounded_under_autocast(model_of):
    """Rounded logits would send tokens to other experts."""
    mixture = model_of("experts").model.layers[0].mlp
    chosen = []
    mixture.experts.register_forward_pre_hook(lambda module, inputs: chosen.append(inputs[1:]))
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    mixture(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixture(x)
    (weights, experts), (rounded_weights, rounded_experts) = chosen
    assert rounded_weights.dtype == torch.float32
    torch.testing.assert_close(rounded_weights, weights, rtol=0, atol=0)
    torch.testing.assert_close(rounded_experts, experts, rtol=0, atol=0)


def test_the_gate_of_a_norm_is_not_rounded_under_autocast(model_of):
    norm = model_of("gated").model.layers[0].attention_pre_norm
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = norm(x)
    torch.testing.assert_close(under_autocast, norm(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["span", "experts_with_all", "dyt", "gated"])
def test_mixed_precision_trains(model_of, name):
    """Under autocast the router and the gates of norms stay in float32, and dtypes fit each other."""
    model = model_of(name).train()
    exact = float(model(ids(TOKENS), labels=ids(TOKENS)).loss)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids(TOKENS), labels=ids(TOKENS)).loss
    loss.backward()
    assert abs(float(loss) - exact) < 0.02 * exact
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())


def test_dropout_is_that_of_the_configuration(tmp_path):
    model = in_torch(export(tmp_path / "model", config_of("span", dropout=0.5)).directory)
    still = logits_of(model)
    np.testing.assert_array_equal(logits_of(model), still)
    assert np.abs(logits_of(model.train()) - still).max() > 0.1


def test_lora_finds_the_projections_by_name(model_of):
    peft = pytest.importorskip("peft")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = model_of("hybrid_star")
    before = logits_of(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=2, task_type="CAUSAL_LM"))
    np.testing.assert_allclose(logits_of(tuned), before, rtol=0, atol=1e-6)
    trainable = [name for name, each in tuned.named_parameters() if each.requires_grad]
    assert len(trainable) == 2 * len(names) * 4
    tuned(ids(TOKENS), labels=ids(TOKENS)).loss.backward()
    merged = tuned.merge_and_unload()
    np.testing.assert_allclose(logits_of(merged), before, rtol=0, atol=1e-6)


def test_lora_on_the_router_is_trained(model_of):
    """It is called as a module: what stands around a layer of torch, of PEFT and of accelerate, works on it."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = peft.get_peft_model(model_of("experts"), lora)
    tuned(ids(TOKENS), labels=ids(TOKENS)).loss.backward()
    trainable = {name: each.grad for name, each in tuned.named_parameters() if each.requires_grad}
    assert any("mlp.router.lora_A" in name for name in trainable)
    assert [name for name, gradient in trainable.items() if gradient is None] == []


@pytest.mark.parametrize("name", ["experts_with_all", "learned_positions", "crmsnorm_padded", "dyt", "gated"])
def test_weights_that_wait_elsewhere_are_fetched(model_of, name):
    """accelerate fetches those of a module when the module is called; a device_map may do so for whole layers."""
    accelerate = pytest.importorskip("accelerate")
    model = model_of(name)
    expected = logits_of(model)
    np.testing.assert_array_equal(logits_of(accelerate.cpu_offload(model, execution_device="cpu")), expected)


def test_the_trainer_evaluates_it(tmp_path, model_of):
    """It leaves the cache out of what it gathers."""
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.tolist()]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "out", use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = transformers.Trainer(model=model_of("span"), args=arguments, eval_dataset=rows)
    loss = float(model_of("span")(ids(TOKENS), labels=ids(TOKENS)).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert trainer.predict(rows).predictions.shape == (2, 12, 61)


@pytest.mark.slow
def test_the_trainer_fine_tunes_it(tmp_path, model_of):
    pytest.importorskip("accelerate")
    model = model_of("experts_with_all").train()
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.tolist() * 8]
    arguments = transformers.TrainingArguments(
        **{"output_dir": tmp_path / "tuned", "max_steps": 30, "per_device_train_batch_size": 4, "use_cpu": True},
        **{"learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "gradient_accumulation_steps": 2},
        **{"gradient_checkpointing": True, "logging_steps": 1, "disable_tqdm": True},
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]
    trainer.save_model(tmp_path / "saved")
    config, params = hn.load_huggingface(tmp_path / "saved")
    ours = np.asarray(hn.Decoder(config).apply({"params": params}, TOKENS))
    np.testing.assert_allclose(ours, logits_of(model.eval()), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid_star", "experts"])
def test_generation_compiles_with_a_static_cache(model_of, fresh_compiler, name):
    if shutil.which("g++") is None:
        pytest.skip("torch compiles for a CPU with a C++ compiler")
    model = model_of(name)
    eager = written(model, TOKENS[:, :4])
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert written(model, TOKENS[:, :4], cache_implementation="static") == eager
