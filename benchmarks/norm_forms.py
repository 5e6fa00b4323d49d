"""The contestants of equivalence.py: one model, decoder or ViT, in eight forms."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn
from vit import ViT, vit_conversion

import hybridnorm_jax as hn
from hybridnorm_jax.equivalence import conversion_of
from hybridnorm_jax.model import norm_functions

FORMS = {
    "pre_ln": "Pre-LN",
    "pre_ln_one_pass": "Pre-LN, one-pass variance",
    "pre_ln_plain": "Pre-LN, no scale and bias",
    "pre_rmsnorm": "Pre-RMSNorm",
    "pre_crmsnorm": "Pre-CRMSNorm, d-1",
    "pre_crmsnorm_padded": "Pre-CRMSNorm, padded",
    "crmsnorm": "CRMSNorm, d, from scratch",
    "no_norm": "no norm",
}


@hn.scheme("benchmark_no_norm", final_norm=False)
def no_norm(layer: int, num_layers: int) -> hn.BlockPlacement:
    """Y = X + Attn(X); X' = Y + FFN(Y)."""
    return hn.BlockPlacement()


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
      model: "decoder" or "vit".
      outputs: size of the vocabulary, or number of classes.
      forward_layers_on_cpu: how many layers a CPU computes in mode forward; in mode train it is one.
      cpu_batch, batch: sequences of a training step, on a CPU and elsewhere.
      seq: tokens of a sequence; None: as --seq says.
    """

    model: str
    num_layers: int
    d_model: int
    num_heads: int
    outputs: int
    forward_layers_on_cpu: int
    cpu_batch: int
    batch: int
    seq: int | None = None

    def layers(self, mode: str, *, on_cpu: bool) -> int:
        """How many layers are measured."""
        if not on_cpu:
            return self.num_layers
        return self.forward_layers_on_cpu if mode == "forward" else 1


SHAPES = {
    "small": Shape(
        model="decoder",
        num_layers=12,
        d_model=768,
        num_heads=12,
        outputs=50257,
        forward_layers_on_cpu=12,
        cpu_batch=16,
        batch=32,
    ),
    "medium": Shape(
        model="decoder",
        num_layers=24,
        d_model=1024,
        num_heads=16,
        outputs=50257,
        forward_layers_on_cpu=8,
        cpu_batch=16,
        batch=32,
    ),
    "vit": Shape(
        model="vit",
        num_layers=12,
        d_model=768,
        num_heads=12,
        outputs=1000,
        forward_layers_on_cpu=12,
        cpu_batch=32,
        batch=128,
        seq=197,
    ),
    # For the tests.
    "tiny": Shape(
        model="decoder",
        num_layers=2,
        d_model=32,
        num_heads=2,
        outputs=64,
        forward_layers_on_cpu=2,
        cpu_batch=2,
        batch=2,
    ),
    "tiny_vit": Shape(
        model="vit",
        num_layers=2,
        d_model=32,
        num_heads=2,
        outputs=10,
        forward_layers_on_cpu=2,
        cpu_batch=2,
        batch=2,
        seq=17,
    ),
}


def one_pass_layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, eps: float = 1e-5, axis: norm_functions.Axes = -1
) -> jax.Array:
    """norm_functions.layer_norm with the variance as mean(x^2) - mean(x)^2, which cancels where the mean is large."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(axis, keepdims=True)
    mean_square = jnp.square(wide).mean(axis, keepdims=True)
    factor = jax.lax.rsqrt(jnp.maximum(mean_square - jnp.square(mean), 0) + eps)
    return ((wide - mean) * (factor * scale.astype(wide.dtype)) + bias.astype(wide.dtype)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Form:
    """One contestant.

    Attributes:
      model: "decoder" or "vit".
      config: of the model that computes.
      trained: the form whose parameters it starts from and trains: "pre_ln" or, without scale and bias,
        "pre_ln_plain".
      convert: makes the model's own parameters of those; None where they are the same.
      one_pass: whether its LayerNorm is one_pass_layer_norm.
    """

    model: str
    config: hn.ModelConfig
    trained: str
    convert: Callable[[Any], Any] | None = None
    one_pass: bool = False

    @property
    def module(self) -> nn.Module:
        """The Flax module."""
        return ViT(self.config) if self.model == "vit" else hn.Decoder(self.config)

    def own(self, theta: Any) -> Any:
        """The model's own parameters, made of those that it trains."""
        return theta if self.convert is None else self.convert(theta)

    def logits(self, params: Any, inputs: jax.Array) -> jax.Array:
        """Logits (batch, positions, outputs); `params` are the model's own."""
        # The caller jits this as a whole: the patch lasts while JAX traces, which is when the norm is looked up.
        patch = mock.patch.object(norm_functions, "layer_norm", one_pass_layer_norm)
        with patch if self.one_pass else contextlib.nullcontext():
            return self.module.apply({"params": params}, inputs)


def make_form(model: str, base: hn.ModelConfig, name: str, pad_to: int) -> Form:
    """The contestant of this name; `base` is Pre-LN's config."""
    plain = dataclasses.replace(base, norm_scale=False, norm_bias=False)
    match name:
        case "pre_ln" | "pre_ln_one_pass":
            return Form(model, base, "pre_ln", one_pass=name == "pre_ln_one_pass")
        case "pre_ln_plain":
            return Form(model, plain, "pre_ln_plain")
        case "crmsnorm":
            return Form(model, dataclasses.replace(plain, norm="crmsnorm"), "pre_ln_plain")
        case "no_norm":
            return Form(model, dataclasses.replace(plain, scheme="benchmark_no_norm"), "pre_ln_plain")
        case "pre_crmsnorm_padded":
            return converted(model, base, trained="pre_ln", form="pre_crmsnorm", pad_to=pad_to)
        case _:
            return converted(model, base, trained="pre_ln", form=name)


def converted(model: str, config: hn.ModelConfig, *, trained: str, form: str, pad_to: int = 1) -> Form:
    """The Pre-LN model of this config in `form`."""
    find_conversion = vit_conversion if model == "vit" else conversion_of
    conversion = find_conversion(config, form, pad_to=pad_to)
    return Form(model, conversion.config, trained, conversion.convert)
