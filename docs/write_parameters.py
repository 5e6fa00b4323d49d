"""Writes parameters.md beside this file: every parameter that a Decoder can have, read off the library itself.

    python docs/write_parameters.py

A test compares the page with what this writes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import hybridnorm_jax as hn
from hybridnorm_jax.mesh.parameter_axes import logical_axes
from hybridnorm_jax.model.abstract_params import abstract_params

PAGE = Path(__file__).with_name("parameters.md")

INTRODUCTION = """# The parameter tree

<!-- Written by docs/write_parameters.py; change that file, then run it. -->

`hn.Decoder(config).init(key, tokens)["params"]` is a tree of plain nested dicts with arrays as leaves. Checkpoints,
`hn.load_run`, `hn.load_huggingface` and `hn.nnx.to_linen_params` hold the same tree. A path such as
`head/kernel` below is `params["head"]["kernel"]`, and in NNX `decoder.head.kernel`.

A *stretch* is a number of consecutive layers that normalize at the same places, and that all have experts or all have
none. A model has as many stretches as its scheme and `model.dense_layers` need. They are called `run_0`, `run_1` and so
on. `hn.describe("hybrid_star", 8)` shows those of a scheme. All layers of a stretch are stacked along the first axis of
each leaf, `layers`. `hn.Block` alone has the same leaves without that axis.

All leaves have the dtype `model.param_dtype`. With `model.norm_scale_plus_one=true` the `scale` of a norm is what it
multiplies by, minus 1. In a parallel block with one norm for both branches (`shared_pre_norm`) there is only
`attention_pre_norm`.
"""

LEAVES = """## Every leaf

*Logical axes* name the dimensions that a mesh may split; `mesh.rules` says which mesh axis splits which. A dash is a
dimension that is never split.

| leaf | shape | logical axes | there when |
|---|---|---|---|
"""

DIMENSIONS = """
| dimension | size |
|---|---|
| layers | layers of the stretch; they add up to `model.num_layers` |
| embed | `model.d_model`; outside the blocks `model.norm_width`, with `model.whole_outside` |
| heads, kv_heads, head_dim | `model.num_heads`, `model.num_kv_heads`, `model.head_dim` |
| mlp | `model.mlp_dim`; in the dense layers of a model with experts `model.dense_mlp_dim` |
| experts, shared | `model.num_experts`, `model.shared_experts` |
| shared * mlp | `model.shared_mlp_dim`, where it is set |
| vocab | `model.vocab_size` |
| positions | `model.max_positions` + `model.position_offset` |
"""

ENCODER = """
## Outside the blocks of an encoder

`hn.Encoder(config)` has the same leaves inside its blocks. Outside them it has these.

| leaf | shape | logical axes | there when |
|---|---|---|---|
"""

EXAMPLE = """
## An example

```python
hn.ModelConfig(
{arguments})
```

has {count:,} parameters:

| leaf | shape |
|---|---|
"""
EXAMPLE_KEYS: dict[str, Any] = {
    "scheme": "hybrid_star",
    "d_model": 512,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 2,
    "vocab_size": 32000,
}

# No two dimensions have the same size, so that a size says which one it is.
SIZES = {
    "d_model": 96,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 20,
    "mlp_dim": 56,
    "vocab_size": 61,
}
NAMES = {
    96: "embed",
    6: "heads",
    2: "kv_heads",
    20: "head_dim",
    56: "mlp",
    61: "vocab",
    32: "positions",
    4: "experts",
    120: "heads * head_dim",
    40: "kv_heads * head_dim",
    168: "shared * mlp",
    1: "1",
    16: "16",
}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "head_bias": True}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "shared_experts": 3, "balance_bias": True}
EXPERTS |= {"shared_expert_gate": True, "shared_expert_gate_bias": True}
# Together they have every leaf.
MODELS: tuple[dict[str, Any], ...] = (
    {"scheme": "peri", "positions": "learned", "max_positions": 30, "position_offset": 2, "activation": "gelu"},
    {"scheme": "keel"},
    {"scheme": "hybrid_output_norm"},
    {"scheme": "hybrid", "attention_norm_per_head": True},
    {"scheme": "qkvc_post"},
    {"scheme": "pre_qk_projection"},
    EXPERTS | {"scheme": "pre", "attention_sinks": True},
    {"scheme": "pre", "layer_scale": True},
    {"scheme": "hybrid_skipinit"},
    {"scheme": "normformer_residual"},
    {"scheme": "simple_norm"},
    {"scheme": "sub_ln"},
    {"scheme": "siamese_hybrid_pre"},
    {"scheme": "siamese_attn_norm"},
    {"scheme": "siamese_post_pre"},
    {"scheme": "ngpt"},
    {"scheme": "pre", "norm": "derf", "learned_embedding_scale": True},
    {"scheme": "pre", "norm": "gated"},
)

# Together they have every leaf that an Encoder has outside its blocks.
ENCODERS: tuple[dict[str, Any], ...] = (
    {
        "image_size": (21, 10),
        "patch_size": (7, 5),
        "num_channels": 3,
        "distillation_token": True,
        "register_tokens": 9,
        "mask_token": True,
        "embedding_norm": "true",
        "pooling": "class_and_mean",
        "num_classes": 11,
        "distillation_head": True,
    },
    {"input": "tokens", "vocab_size": 61, "max_positions": 32, "pooling": "attention", "activation": "swiglu"},
)
ENCODER_NAMES = {
    96: "embed",
    192: "pooled",
    6: "heads",
    16: "embed / heads",
    56: "mlp",
    61: "vocab",
    32: "positions",
    17: "positions",
    7: "patch_height",
    5: "patch_width",
    3: "channels",
    1: "1",
    9: "registers",
    11: "classes",
}
ENCODER_WHEN = {
    "patch_embedding": "`input=pixels`; the bias with `patch_bias=true`",
    "token_embedding": "`input=tokens`",
    "class_token": "`class_token=true`",
    "distillation_token": "`distillation_token=true`",
    "register_tokens": "`register_tokens` above 0",
    "mask_token": "`mask_token=true`",
    "position_embedding": "`positions=learned`",
    "embedding_norm": "the scheme has one, or `embedding_norm=true`; `outer_norm_scale`, `outer_norm_bias`",
    "streams": "the scheme has a side stream; `outer_norm_scale`, `outer_norm_bias`",
    "final_norm": "the scheme has a final norm; `outer_norm_scale`, `outer_norm_bias`",
    "pooling": "`pooling=attention`",
    "head": "`num_classes`; the bias with `head_bias=true`",
    "distillation_head": "`distillation_head=true`; the bias with `head_bias=true`",
}

# Start of a leaf's path -> what brings it.
WHEN = {
    "token_embedding": "always",
    "position_embedding": "`positions=learned`",
    "embedding_scale": "`learned_embedding_scale=true`",
    "embedding_norm": "the scheme has an embedding norm (or `embedding_norm=true`)",
    "run_<i>/attention/query": "always",
    "run_<i>/attention/key": "always",
    "run_<i>/attention/value": "always",
    "run_<i>/attention/out": "always",
    "run_<i>/attention/sinks": "`attention_sinks=true`",
    "run_<i>/attention/q_norm": "the scheme normalizes q",
    "run_<i>/attention/k_norm": "the scheme normalizes k",
    "run_<i>/attention/v_norm": "the scheme normalizes v",
    "run_<i>/attention/context_norm": "the scheme normalizes the context",
    "run_<i>/attention/head_scales": "the scheme has scales of heads",
    "run_<i>/attention/qk_scale": "the scheme is `ngpt`",
    "run_<i>/attention_pre_norm": "the scheme has this norm",
    "run_<i>/attention_branch_norm": "the scheme has this norm",
    "run_<i>/attention_post_norm": "the scheme has this norm",
    "run_<i>/attention_entry_norm": "the scheme has this norm",
    "run_<i>/attention_side_norm": "attention reads the side stream",
    "run_<i>/attention_own_norm": "the scheme has this norm",
    "run_<i>/attention_own_vector": "the scheme has this vector",
    "run_<i>/attention_layer_scale": "`layer_scale=true`, or the scheme has it",
    "run_<i>/attention_residual_vector": "the scheme has this vector",
    "run_<i>/feed_forward/gate": "dense, with a gated `activation` such as swiglu",
    "run_<i>/feed_forward/up": "dense",
    "run_<i>/feed_forward/down": "dense",
    "run_<i>/feed_forward/gate_norm": "the scheme has this norm",
    "run_<i>/feed_forward/up_norm": "the scheme has this norm",
    "run_<i>/feed_forward/hidden_norm": "the scheme has this norm",
    "run_<i>/feed_forward/gate_scale": "the scheme is `ngpt`, with a gated `activation`",
    "run_<i>/feed_forward/up_scale": "the scheme is `ngpt`",
    "run_<i>/feed_forward/router": "experts",
    "run_<i>/feed_forward/balance_bias": "experts, `balance_bias=true`",
    "run_<i>/feed_forward/expert_gate": "experts",
    "run_<i>/feed_forward/expert_up": "experts",
    "run_<i>/feed_forward/expert_down": "experts",
    "run_<i>/feed_forward/shared": "experts, `shared_experts` above 0",
    "run_<i>/feed_forward/shared_gate": "experts, `shared_expert_gate=true`",
    "run_<i>/feed_forward_pre_norm": "the scheme has this norm",
    "run_<i>/feed_forward_branch_norm": "the scheme has this norm",
    "run_<i>/feed_forward_post_norm": "the scheme has this norm",
    "run_<i>/feed_forward_entry_norm": "the scheme has this norm",
    "run_<i>/feed_forward_side_norm": "the feed-forward layer reads the side stream",
    "run_<i>/feed_forward_layer_scale": "`layer_scale=true`, or the scheme has it",
    "run_<i>/feed_forward_residual_vector": "the scheme has this vector",
    "streams/main_norm": "the scheme has a side stream that ends so",
    "streams/side_norm": "the scheme has a side stream",
    "final_norm": "the scheme has a final norm",
    "head/kernel": "`tie_embeddings=false`",
    "head/bias": "`head_bias=true`",
    "head/scales": "the scheme is `ngpt`",
}


class Leaf(NamedTuple):
    """A row of the table."""

    path: str
    shape: tuple[str, ...]
    axes: tuple[str, ...]


def shapes(config: hn.ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every parameter by its path."""
    tokens = np.zeros((1, 1), np.int32)
    tree = jax.eval_shape(lambda: hn.Decoder(config).init(jax.random.key(0), tokens))["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree).items()}


def leaves(config: hn.ModelConfig) -> Iterator[Leaf]:
    """The rows of one model."""
    for path, shape in shapes(config).items():
        stacked = path[0].startswith("run_")
        names = [NAMES[size] for size in shape[1 if stacked else 0 :]]
        yield Leaf(
            path=re.sub(r"^run_\d+", "run_<i>", "/".join(path)),
            shape=("layers", *names) if stacked else tuple(names),
            axes=tuple(axis or "-" for axis in logical_axes(path, len(shape))),
        )


def encoder_rows() -> list[str]:
    """The rows of what encoders have outside their blocks."""
    rows: dict[str, str] = {}
    for keys in ENCODERS:
        sizes = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "num_kv_heads", "head_dim")}
        config = hn.EncoderConfig(**{**sizes, "activation": "gelu", **BIASES, **keys})
        shapes_by_path = {path: leaf.shape for path, leaf in flatten_dict(abstract_params(config)).items()}
        for path, shape in shapes_by_path.items():
            if path[0].startswith("run_"):
                continue
            names = ", ".join(ENCODER_NAMES[size] for size in shape)
            axes = ", ".join(axis or "-" for axis in logical_axes(path, len(shape)))
            rows["/".join(path)] = f"| `{'/'.join(path)}` | ({names}) | ({axes}) | {ENCODER_WHEN[path[0]]} |"
    order = list(ENCODER_WHEN)
    return [rows[path] for path in sorted(rows, key=lambda path: (order.index(path.partition("/")[0]), path))]


def when(path: str) -> str:
    """What brings the leaf at this path."""
    start = max((start for start in WHEN if f"{path}/".startswith(f"{start}/")), key=len)
    name = path.rpartition("/")[2]
    if "norm" in path and name not in ("scale", "bias"):
        kinds = ", ".join(f"`{kind.name}`" for kind in hn.NORM_KINDS.values() if name in kind.parameter_names)
        return f"{WHEN[start]}, `norm` is {kinds}"
    if "norm" in path:
        is_outside = not path.startswith("run_")
        is_inside = "/attention/" in path or "/feed_forward/" in path
        flag = "attention_norm" if is_inside else "outer_norm" if is_outside else "norm"
        return f"{WHEN[start]}, `{flag}_{name}=true`"
    if name != "bias" or start.endswith("bias"):
        return WHEN[start]
    if path.endswith("attention/out/bias"):
        return "`attention_output_bias=true`, which is `attention_bias` by default"
    if path.endswith(("down/bias", "router/bias")):
        flag = "router_bias" if path.endswith("router/bias") else "mlp_output_bias"
        return f"{WHEN[start]}, `{flag}=true`, which is `mlp_bias` by default"
    if start.endswith("shared_gate"):
        return f"{WHEN[start]}, `shared_expert_gate_bias=true`"
    key = "attention_bias" if "/attention/" in path else "mlp_bias"
    return f"`{key}=true`" if WHEN[start] == "always" else f"{WHEN[start]}, `{key}=true`"


def page() -> str:
    """The text of parameters.md."""
    found = {leaf for model in MODELS for leaf in leaves(hn.ModelConfig(**SIZES, **BIASES, **model))}
    order = {start: number for number, start in enumerate(WHEN)}

    def place(leaf: Leaf) -> tuple[int, str, int]:
        start = max((start for start in order if f"{leaf.path}/".startswith(f"{start}/")), key=len)
        return order[start], leaf.path, len(" ".join(leaf.shape))

    rows = [
        f"| `{leaf.path}` | ({', '.join(leaf.shape)}) | ({', '.join(leaf.axes)}) | {when(leaf.path)} |"
        for leaf in sorted(found, key=place)
    ]
    example = shapes(hn.ModelConfig(**EXAMPLE_KEYS))
    arguments = "".join(f"    {key}={json.dumps(value)},\n" for key, value in EXAMPLE_KEYS.items())
    count = sum(int(np.prod(shape)) for shape in example.values())
    sizes = [f"| `{'/'.join(path)}` | {shape} |" for path, shape in sorted(example.items())]
    example_head = EXAMPLE.format(arguments=arguments, count=count)
    return (
        INTRODUCTION
        + "\n"
        + LEAVES
        + _lines(rows)
        + DIMENSIONS
        + ENCODER
        + _lines(encoder_rows())
        + example_head
        + _lines(sizes)
    )


def _lines(rows: list[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
