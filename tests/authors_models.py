"""The goldens of placements by the authors' own code, and the models that they are of; for the tests that read them."""

from pathlib import Path

import numpy as np

import hybridnorm_jax as hn

GOLDENS = Path(__file__).parent / "goldens" / "placements"
SIZES = {"d_model": 32, "num_layers": 3, "num_heads": 4, "mlp_dim": 48, "vocab_size": 61}
TORCHSCALE = {"max_positions": 38}
FAIRSEQ = {"max_positions": 64}
SIAMESE = {"num_kv_heads": 2}
NANOGPT = {"mlp_dim": 128, "max_positions": 40}
LLAMA = {"norm_eps": 1e-6}
PRORES = {"ramp_steps": 100, "ramp_at": 40, **LLAMA}
# golden -> the project, and what of the model it does not say. `deepnorm_pre` is what a flag alone makes of torchscale.
CASES = {
    "torchscale_subln": ("torchscale", {"scheme": "sub_ln", **TORCHSCALE}),
    "torchscale_deepnorm": ("torchscale", {"scheme": "deepnorm", **TORCHSCALE}),
    "torchscale_deepnorm_default_config": ("torchscale", {"scheme": "deepnorm_pre", **TORCHSCALE}),
    "torchscale_post": ("torchscale", {"scheme": "post", **TORCHSCALE}),
    "normformer": ("fairseq", {"scheme": "normformer", "activation": "gelu", **FAIRSEQ}),
    "normformer_resid": ("fairseq", {"scheme": "normformer_residual", "activation": "gelu", **FAIRSEQ}),
    "residual": ("fairseq", {"scheme": "residual", "activation": "relu", **FAIRSEQ}),
    "residual_scaled": ("fairseq", {"scheme": "residual_scaled", "activation": "relu", **FAIRSEQ}),
    "b2t": ("b2t", {"scheme": "b2t", **FAIRSEQ}),
    "b2t_repo_post": ("b2t", {"scheme": "post", **FAIRSEQ}),
    "simplegpt": ("simplegpt", {"num_kv_heads": 2, "mlp_dim": 56}),
    # The golden "ngpt" has the rotation of the published repository, which is none.
    "ngpt_rope": ("ngpt", {"mlp_dim": 128}),
    "ngpt_rope_normalized": ("ngpt", {"mlp_dim": 128}),
    "siamese_hybrid_pre": ("siamese", {"scheme": "siamese_hybrid_pre", **SIAMESE}),
    "siamese_attn_norm": ("siamese", {"scheme": "siamese_attn_norm", **SIAMESE}),
    "dyt_llama": ("dyt_llama", {}),
    "dyt_nanogpt": ("dyt_nanogpt", NANOGPT),
    "derf_nanogpt": ("derf_nanogpt", NANOGPT),
    "mix_ln": ("mix_ln", {"scheme": "mix_ln", "num_layers": 4, **LLAMA}),
    "mix_ln_repo_pre": ("mix_ln", {"scheme": "pre", **LLAMA}),
    "mix_ln_repo_post": ("mix_ln", {"scheme": "post_final_norm", **LLAMA}),
    "mix_ln_repo_sandwich": ("mix_ln", {"scheme": "sandwich", **LLAMA}),
    "layernorm_scaling": ("layernorm_scaling", {"scheme": "layernorm_scaling", **LLAMA}),
    "deepnorm_llama": ("prores", {"scheme": "deepnorm_final_norm", **LLAMA}),
    "prores_pre": ("prores", {"scheme": "prores_pre", **PRORES}),
    "prores_post": ("prores", {"scheme": "prores_post", **PRORES}),
    "prores_sandwich": ("prores", {"scheme": "prores_sandwich", **PRORES}),
    "prores_deeppost": ("prores", {"scheme": "prores_deepnorm", **PRORES}),
}


def case(name, **changes):
    """The project, the config and the content of a golden."""
    project, keys = CASES[name]
    with np.load(GOLDENS / f"{name}.npz") as file:
        return project, hn.PROJECTS[project].config(**SIZES | keys | changes), dict(file)


def part(golden, prefix):
    return {name.removeprefix(prefix): array for name, array in golden.items() if name.startswith(prefix)}
