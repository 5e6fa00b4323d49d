"""What transformers does with our PyTorch code: caches, padding, saving, compiling, fine-tuning."""

import json
import shutil
import sys
import weakref

import numpy as np
import pytest
from exported_models import KINDS, config_of, export, ids, in_torch, torch, transformers

import hybridnorm_jax as hn
from hybridnorm_jax.generation.generate import generate
from hybridnorm_jax.interop.architectures import config_from_json, mathematics

TOKENS = np.random.default_rng(1).integers(0, 61, (2, 12)).astype(np.int32)
SOME = (
    "hybrid_star",
    "span",
    "experts_with_all",
    "learned_positions",
    "crmsnorm_padded",
    "sinks_and_windows",
    "score_scale_and_cap",
    "alibi_rounded",
    "alibi_of_six_heads",
    "no_rotation_in_some",
    "longrope",
    "dense_among_sparse",
    "one_norm_for_both",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported model by its name, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = export(tmp_path_factory.mktemp(name) / "model", config_of(name))
        return made[name]

    return get


@pytest.fixture
def fresh_compiler():
    """torch.compile without programs: it counts those of one line of code, also those of other models."""
    torch.compiler.reset()


@pytest.fixture
def model_of(exported):
    """A fresh model by its name."""
    return lambda name, **keys: in_torch(exported(name).directory, **keys)


def logits_of(model, tokens=TOKENS, **keys):
    with torch.no_grad():
        return model(ids(tokens), **keys).logits.numpy()


def written(model, tokens, **keys):
    return model.generate(ids(tokens), do_sample=False, max_new_tokens=8, **keys)[:, tokens.shape[1] :].tolist()


def left_padded(rows, pad=0):
    """(tokens, attention mask) of rows of several lengths."""
    width = max(map(len, rows))
    tokens = np.array([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, ids(mask)


# ---- Caches and padding.


@pytest.mark.parametrize("name", ["hybrid_star", "span", "experts", "learned_positions"])
def test_text_is_that_of_our_own_generation(exported, model_of, name):
    config, params, _ = exported(name)
    rows = [TOKENS[0, :7].tolist(), TOKENS[1, :3].tolist()]
    ours = [row.tolist() for row in generate(config, params, rows, max_new_tokens=8)]
    tokens, mask = left_padded(rows)
    assert written(model_of(name), tokens, attention_mask=mask) == ours


@pytest.mark.parametrize("name", SOME)
def test_a_static_cache_gives_the_same_text(model_of, name):
    model = model_of(name)
    rows = [TOKENS[0, :7].tolist(), TOKENS[1, :3].tolist()]
    tokens, mask = left_padded(rows)
    dynamic = written(model, tokens, attention_mask=mask)
    model.generation_config.disable_compile = True
    assert written(model, tokens, attention_mask=mask, cache_implementation="static") == dynamic
    assert written(model, tokens, attention_mask=mask, use_cache=False) == dynamic


@pytest.mark.parametrize("name", SOME)
def test_padding_on_the_left_changes_nothing(model_of, name):
    """Positions are counted without padding, and what stands there is seen by nobody."""
    model = model_of(name)
    tokens, mask = left_padded([TOKENS[0], TOKENS[1, :5]], pad=7)
    padded = logits_of(model, tokens, attention_mask=mask)
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[1, -5:], logits_of(model, TOKENS[1:, :5])[0], rtol=0, atol=1e-5)
    other, _ = left_padded([TOKENS[0], TOKENS[1, :5]], pad=8)
    np.testing.assert_array_equal(logits_of(model, other, attention_mask=mask)[1, -5:], padded[1, -5:])
    np.testing.assert_allclose(padded[0], logits_of(model)[0], rtol=0, atol=1e-5)


def test_no_row_of_a_mask_is_empty(model_of):
    """On some devices a query that sees nothing is NaN, which the next layer's values would spread."""
    module = type(model_of("span")).__module__.replace("modeling_", "positions_")
    causal_mask = sys.modules[module].causal_mask
    _, attention_mask = left_padded([TOKENS[0], TOKENS[1, :5]])
    mask = causal_mask(attention_mask, 12, 0, None, attention_mask.device)
    assert mask.shape == (2, 1, 12, 12)
    assert mask.any(-1).all()
    assert not mask[1, 0, 7:, :7].any()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("cache", [transformers.DynamicCache, None])
def test_a_prompt_in_pieces_has_the_logits_of_the_whole(model_of, name, cache):
    model = model_of(name)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16) if cache is None else cache()
    whole = logits_of(model)
    pieces = [logits_of(model, TOKENS[:, a:b], past_key_values=cache) for a, b in ((0, 5), (5, 6), (6, 12))]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=1e-5)


def test_a_cache_holds_the_kv_heads_alone(model_of):
    model = model_of("hybrid_star")
    output = model(ids(TOKENS))
    cache = output.cache if "cache" in output else output.past_key_values
    assert len(cache.layers) == 4
    assert {tuple(layer.keys.shape) for layer in cache.layers} == {(2, 2, 12, 8)}
    assert model(ids(TOKENS), use_cache=False).get("cache") is None


def test_embeddings_and_positions_may_be_given(model_of):
    model = model_of("span")
    embedded = model.get_input_embeddings()(ids(TOKENS))
    positions = torch.arange(12)[None]
    with torch.no_grad():
        given = model(inputs_embeds=embedded, position_ids=positions).logits.numpy()
    np.testing.assert_array_equal(given, logits_of(model))
    with pytest.raises(ValueError, match="give one of input_ids and inputs_embeds"):
        model(ids(TOKENS), inputs_embeds=embedded)


def test_outputs_are_those_of_transformers(model_of):
    model = model_of("peri")
    output = model(ids(TOKENS), output_hidden_states=True, logits_to_keep=3)
    assert output.logits.shape == (2, 3, 61)
    assert len(output.hidden_states) == 5
    np.testing.assert_array_equal(model.lm_head(output.hidden_states[-1])[:, -3:].detach(), output.logits.detach())
    loss, logits = model(ids(TOKENS), labels=ids(TOKENS), return_dict=False, use_cache=False)
    assert loss.shape == ()
    assert logits.shape == (2, 12, 61)
    labels = ids(TOKENS)
    labels[:, :-1] = -100
    last = torch.nn.functional.cross_entropy(logits[:, -2], labels[:, -1])
    torch.testing.assert_close(model(ids(TOKENS), labels=labels).loss, last)


def test_more_tokens_than_learned_positions_are_refused(model_of):
    model = model_of("learned_positions")
    with pytest.raises(ValueError, match="position 20, counted from 0, but max_position_embeddings=20"):
        model(ids(np.zeros((1, 21))))
    assert model.generate(ids(TOKENS), do_sample=False, max_new_tokens=9).shape == (2, 21)
    with pytest.raises(ValueError, match="position 20, counted from 0, but max_position_embeddings=20"):
        model.generate(ids(TOKENS), do_sample=False, max_new_tokens=10)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_cached_text_that_grows_beyond_the_length_of_longrope_is_refused(tmp_path, fresh_compiler, is_compiled):
    """There all its tokens are rotated anew, and a cache holds the old ones. Our own generation refuses it, too."""
    model = in_torch(export(tmp_path / "model", config_of("longrope", rope_original_length=8)).directory)
    keys = {"do_sample": False, "cache_implementation": "static" if is_compiled else None}
    if is_compiled:
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    # The last new token is not read, so that 8 tokens are.
    assert model.generate(ids(TOKENS[:, :5]), max_new_tokens=4, **keys).shape == (2, 9)
    with pytest.raises(ValueError, match=r"a text with a cache grows beyond 8 tokens \(rotary_original_length\)"):
        model.generate(ids(TOKENS[:, :5]), max_new_tokens=5, **keys)
    assert model.generate(ids(TOKENS[:, :9]), max_new_tokens=5, **keys).shape == (2, 14)
    if not is_compiled:
        cache = model(ids(TOKENS[:, :5])).past_key_values
        with pytest.raises(ValueError, match="grows beyond 8 tokens"):
            model(ids(TOKENS[:, 5:]), past_key_values=cache)
        model.generate(ids(TOKENS[:, :5]), max_new_tokens=5, use_cache=False)


def test_padding_takes_no_learned_position(model_of):
    model = model_of("learned_positions")
    tokens, mask = left_padded([np.zeros(2), TOKENS[0]])
    tokens, mask = np.pad(tokens, ((0, 0), (15, 0))), torch.nn.functional.pad(mask, (15, 0))
    padded = logits_of(model, tokens, attention_mask=mask)
    np.testing.assert_allclose(padded[1, -12:], logits_of(model, TOKENS[:1])[0], rtol=0, atol=1e-5)


def test_a_mask_of_the_new_tokens_alone_is_refused(model_of):
    """It would hide all tokens before them."""
    model = model_of("span")
    cache = model(ids(TOKENS[:, :8])).past_key_values
    with pytest.raises(ValueError, match="attention_mask is of 1 tokens, but there are 9 so far"):
        model(ids(TOKENS[:, 8:9]), past_key_values=cache, attention_mask=ids(np.ones((2, 1))))


def test_streams_are_kept_only_where_they_are_asked_for(model_of):
    """From the configuration, too. Those that nobody asked for would stay in memory until the last layer."""
    model, first, kept = model_of("span"), [], []
    model.model.layers[0].register_forward_hook(lambda module, inputs, x: first.append(weakref.ref(x)))
    model.model.norm.register_forward_pre_hook(lambda module, inputs: kept.append(first[-1]() is not None))
    with torch.no_grad():
        assert model(ids(TOKENS)).hidden_states is None
        assert len(model(ids(TOKENS), output_hidden_states=True).hidden_states) == 5
        model.config.output_hidden_states = True
        assert len(model(ids(TOKENS)).hidden_states) == 5
    assert kept == [False, True, True]


# ---- Loading and saving.


@pytest.mark.parametrize("name", SOME)
def test_what_transformers_saves_again_is_the_same_model(tmp_path, model_of, name):
    """On both sides: transformers leaves out of config.json what is as it is by default."""
    model = model_of(name)
    model.save_pretrained(tmp_path / "again")
    again = in_torch(tmp_path / "again")
    np.testing.assert_array_equal(logits_of(again), logits_of(model))
    config, params = hn.load_huggingface(tmp_path / "again")
    ours = np.asarray(hn.Decoder(config).apply({"params": params}, TOKENS))
    np.testing.assert_allclose(ours, logits_of(model), rtol=0, atol=2e-5)


def test_a_value_that_is_the_default_may_be_left_out(tmp_path):
    """As some versions of transformers leave it out when they save: no default may follow from another value."""
    config = config_of("hybrid_star", num_heads=24, num_kv_heads=12, head_dim=64, d_model=16, num_layers=2)
    config, _, directory = export(tmp_path / "model", config)
    model = in_torch(directory)
    defaults = type(model.config)().to_dict()
    file = directory / "config.json"
    document = json.loads(file.read_text())
    kept = {key: value for key, value in document.items() if key == "model_type" or defaults.get(key) != value}
    assert "num_key_value_heads" not in kept
    assert len(kept) < len(document) / 2
    file.write_text(json.dumps(kept))
    np.testing.assert_array_equal(logits_of(in_torch(directory)), logits_of(model))
    again, _ = hn.load_huggingface(directory)
    assert mathematics(again) == mathematics(config)


@pytest.mark.parametrize("name", ["span", "tied_with_bias", "experts_with_all"])
def test_loading_leaves_nothing_uninitialized(exported, name):
    """transformers builds the model without memory and then fills what it finds in the file: all must be there."""
    _, _, directory = exported(name)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True
    )
    assert {key: list(value) for key, value in found.items() if value} == {}
    # A buffer that no file holds would be whatever was in memory.
    stored = set(model.state_dict())
    assert {buffer for buffer, _ in model.named_buffers()} <= stored
    assert all(torch.isfinite(each).all() for each in model.state_dict().values())


def test_a_tied_head_is_one_tensor_with_the_embedding(exported, model_of):
    assert exported("learned_positions").config.tie_embeddings
    model = model_of("learned_positions")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_model_without_its_head_and_a_device_map(exported):
    pytest.importorskip("accelerate")
    _, _, directory = exported("span")
    body = transformers.AutoModel.from_pretrained(directory, trust_remote_code=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, device_map="auto")
    with torch.no_grad():
        hidden = body(ids(TOKENS)).last_hidden_state
        np.testing.assert_allclose(whole.lm_head(hidden).numpy(), logits_of(whole), rtol=0, atol=1e-6)


def test_fresh_weights_are_drawn(exported):
    """From the configuration alone: scales start where the placement says, biases at 0."""
    config = transformers.AutoConfig.from_pretrained(exported("experts_with_all").directory, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    kernel = model.model.layers[0].mlp.experts.gate_proj
    assert 0.5 * config.initializer_range < float(kernel.std()) < 2 * config.initializer_range
    assert float(model.model.layers[0].attention_post_norm.weight.min()) == 1
    assert float(model.model.layers[0].mlp.experts.down_bias.abs().max()) == 0
    config = transformers.AutoConfig.from_pretrained(exported("hybrid_output_norm").directory, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    torch.testing.assert_close(model.model.layers[1].attention_branch_norm.weight, torch.full((32,), 8**-0.5))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm", "batchnorm", "norm='batchnorm': must be one of rmsnorm"),
        ("placements", [{}], "placements: 1 of them for 4 layers"),
        ("placements", [{"wings": 2}] * 4, r"placements\[0\].wings: not known"),
        ("placements", [{"attention": {"pre": 2}}] * 4, r"placements\[0\].attention.pre=2: must be one of False, True"),
        ("placements", [{"attention": {"tail": 2}}] * 4, r"placements\[0\].attention: its part='tail'"),
        ("placements", [{"attention": {"branch_scale": "x"}}] * 4, "branch_scale='x': must be a number"),
        ("num_key_value_heads", 3, "num_key_value_heads=3: must divide"),
        ("attn_implementation", "flash_attention_2", "[Ff]lash"),
        ("attn_implementation", "eager", "attn_implementation='eager': this model has sdpa alone"),
    ],
)
def test_nonsense_is_refused_by_name(exported, key, value, message):
    with pytest.raises((ValueError, ImportError), match=message):
        in_torch(exported("span").directory, **{key: value})


# ---- Compiling and training.


@pytest.mark.parametrize("name", ["hybrid_star", "span", "experts_with_all", "learned_positions"])
def test_the_forward_pass_is_one_graph(model_of, fresh_compiler, name):
    model = model_of(name)
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    np.testing.assert_allclose(logits_of(graph), logits_of(model), rtol=0, atol=1e-5)
    tokens, mask = left_padded([TOKENS[0], TOKENS[1, :5]])
    padded = logits_of(graph, tokens, attention_mask=mask)
    np.testing.assert_allclose(padded, logits_of(model, tokens, attention_mask=mask), rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("name", ["span", "experts_with_all"])
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


@pytest.mark.parametrize("name", ["span", "experts_with_all"])
def test_mixed_precision_trains(model_of, name):
    """Under autocast the router stays in float32, and dtypes fit each other."""
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


@pytest.mark.parametrize("name", ["experts_with_all", "learned_positions", "crmsnorm_padded"])
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
def test_generation_compiles_with_a_static_cache(model_of, name):
    if shutil.which("g++") is None:
        pytest.skip("torch compiles for a CPU with a C++ compiler")
    model = model_of(name)
    eager = written(model, TOKENS[:, :4])
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert written(model, TOKENS[:, :4], cache_implementation="static") == eager


def test_every_name_of_a_kind_is_used():
    assert set(SOME) - set(hn.SCHEMES) <= set(KINDS)


def test_the_defaults_of_both_sides_are_the_same():
    from hybridnorm_jax.interop.pytorch.configuration_hybridnorm import HybridNormConfig

    document = HybridNormConfig().to_dict()
    name, stated = config_from_json(json.loads(json.dumps(document)), "all keys")
    assert name == "hybridnorm"
    assert stated == config_from_json({"model_type": "hybridnorm"}, "no keys")[1]
