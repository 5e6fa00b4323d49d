"""The directories that cases start from: small and whole, so that only what a case changes is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
TINY = """model: {scheme: pre, norm: layernorm, d_model: 8, num_heads: 1, num_layers: 1, mlp_dim: 16, vocab_size: 257}
data: {source: text, files: [good.jsonl], cache_dir: cache, validation_fraction: 0.5}
train: {steps: 2, batch_size: 1, seq_len: 16}
"""


def make_templates(directory: Path, case: Path) -> None:
    """`text`: a configuration and texts; `run`: besides a run with one checkpoint; `hf_llama`, ...: Hugging Face's.

    Args:
      case: where a copy of one will be; a run names the directory in which it was made.
    """
    text = directory / "text"
    text.mkdir(parents=True)
    (text / "tiny.yaml").write_text(TINY)
    (text / "text.txt").write_text("A line of text.\n\n" * 200)
    records = [json.dumps({"text": f"Document {number} has some words in it."}) for number in range(50)]
    (text / "good.jsonl").write_text("\n".join(records))
    np.save(text / "good.npy", np.arange(4000, dtype=np.uint16) % 257)
    shutil.copytree(text, case)
    _save_run(case)
    case.rename(directory / "run")
    for name in ("hf_llama", "hf_gpt2", "hf_olmo2_bf16_sharded", "hf_olmoe"):
        shutil.copytree(GOLDENS / name, directory / name / "model")


def _save_run(directory: Path) -> None:
    import jax

    import hybridnorm_jax as hn
    from hybridnorm_jax.config.yaml_files import build, gather
    from hybridnorm_jax.model.abstract_params import abstract_params

    config = build(gather([("tiny.yaml", TINY)], ["run.name=saved"]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_params(config.model))
    hn.save_run(str(directory / "runs" / "saved"), config, params, step=1)
