"""A small model with a tokenizer, as a run of ours and as a Hugging Face directory of the same weights."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import hybridnorm_jax as hn
from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.run_config import EvalSection, RunConfig, TrainSection
from hybridnorm_jax.data.tokens.tokenizers import load_tokenizer
from hybridnorm_jax.kernels.token_logits import token_logits
from hybridnorm_jax.mesh.device_mesh import make_mesh
from hybridnorm_jax.model.loss import cross_entropy
from hybridnorm_jax.training.program import Program

TASKS = Path(__file__).parent / "evaluation" / "tasks"
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
    tokenizer.train_from_iterator(texts(), trainer)
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


def texts() -> list[str]:
    """What the tasks ask for, with the right answers; but for one question, which the model will get wrong."""
    records = {file.stem: [json.loads(line) for line in file.open()] for file in TASKS.glob("*.jsonl")}
    return [
        *(f"{each['question']} It is {each['choices'][each['answer']]}." for each in records["colours"][:-1]),
        *(each["page"] for each in records["pages"]),
        *(f"{each['begin'].rstrip()} {each['go_on'].strip()}\nand so on." for each in records["counting"]),
    ]


def parameters(config: RunConfig, *, steps: int = 40):
    """Trained for a moment on `texts`, so that answers end and some are right."""
    tokenizer = load_tokenizer(config.data)
    stream, begins = [], []
    for ids in tokenizer.encode_batch(texts()):
        begins.append(len(stream))
        stream += [*ids.tolist(), tokenizer.separator_id]
    # Every document also stands at the beginning of a row, as the contexts of tasks do.
    length, again = 48, 2 * stream
    starts = [*begins, *range(0, len(stream), 7)]
    rows = np.array([again[start : start + length + 1] for start in starts], np.int32)
    model = hn.Decoder(config.model)
    params = jax.jit(model.init)(jax.random.key(1), rows[:1, :2])["params"]
    optimizer = optax.adam(1e-2)

    def loss(params):
        logits = model.apply({"params": params}, rows[:, :-1])
        found = token_logits(logits, rows[:, 1:])
        return cross_entropy(found, np.ones(rows[:, 1:].shape, np.float32)).nll / rows[:, 1:].size

    @jax.jit
    def train(params):
        def step(state, _):
            params, moments = state
            updates, moments = optimizer.update(jax.grad(loss)(params), moments)
            return (optax.apply_updates(params, updates), moments), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return params

    return train(params)


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
