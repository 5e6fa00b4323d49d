"""A small model with a tokenizer, as a run of ours and as a Hugging Face directory of the same weights."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import hybridnorm_jax as hn
from hybridnorm_jax.config.run_config import DataSection, EvalSection, RunConfig, TrainSection
from hybridnorm_jax.data.tokenizers import load_tokenizer
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.training.program import Program

TASKS = Path(__file__).parent / "tasks"
SEPARATOR = "<|endoftext|>"
WINDOW, VOCAB = 96, 320


def write_tokenizer(path: Path) -> None:
    """Byte-level BPE, trained on the tasks' own texts, so that stop strings and boundaries are parts of tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([file.read_text() for file in sorted(TASKS.glob("*.jsonl"))], trainer)
    tokenizer.save(str(path))


def run_config(tokenizer: Path, *, scheme: str = "pre", batch_size: int = 4) -> RunConfig:
    """Of a model that Llama is, by default."""
    model = hn.ModelConfig(
        scheme=scheme,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=48,
        vocab_size=VOCAB,
        norm_eps=1e-5,
        attention="xla",
    )
    return RunConfig(
        model=model,
        data=DataSection(source="text", files=("none.txt",), tokenizer=str(tokenizer)),
        train=TrainSection(seq_len=WINDOW, batch_size=8),
        eval=EvalSection(batch_size=batch_size),
    )


def parameters(config: RunConfig):
    """Fresh ones, with a larger head, which tells tokens apart as training does."""
    params = hn.Decoder(config.model).init(jax.random.key(1), np.zeros((1, 4), np.int32))["params"]
    if config.model.tie_embeddings:
        return params
    return params | {"head": {"kernel": 3 * params["head"]["kernel"]}}


def one_device_program(config: RunConfig) -> Program:
    """On the first device alone."""
    return Program(config, make_mesh({}, jax.devices()[:1]))


def write_huggingface(folder: Path, config: RunConfig, params) -> None:
    """The same weights and the same tokenizer for transformers."""
    tokenizer = load_tokenizer(config.data)
    extra = {"max_position_embeddings": WINDOW, "eos_token_id": tokenizer.separator_id}
    hn.save_huggingface(folder, config.model, params, extra=extra)
    (folder / "tokenizer.json").write_bytes(Path(config.data.tokenizer).read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SEPARATOR, "model_max_length": WINDOW}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def with_window(config: RunConfig, window: int) -> RunConfig:
    """The same model, which reads another number of tokens."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=window))
