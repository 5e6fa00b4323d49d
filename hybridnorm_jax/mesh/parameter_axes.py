"""The logical axes of every parameter. sharding_rules.py says on which mesh axes they lie."""

# Last two parts of a parameter's path -> its logical axes; inside a run "layers" comes first. Norms have no entry of
# their own: a vector is not worth the communication of sharding it.
PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "token_embedding/embedding": ("vocab", "embed"),
    "position_embedding/embedding": (None, "embed"),
    "head/kernel": ("embed", "vocab"),
    "head/bias": ("vocab",),
    "distillation_head/kernel": ("embed", "vocab"),
    "distillation_head/bias": ("vocab",),
    "patch_embedding/kernel": (None, None, None, "embed"),
    "patch_embedding/bias": (None,),
    "class_token/embedding": (None, "embed"),
    "distillation_token/embedding": (None, "embed"),
    "register_tokens/embedding": (None, "embed"),
    "mask_token/embedding": (None, "embed"),
    "probe/embedding": (None, "embed"),
    "query/kernel": ("embed", "heads", "head_dim"),
    "key/kernel": ("embed", "kv_heads", "head_dim"),
    "value/kernel": ("embed", "kv_heads", "head_dim"),
    "out/kernel": ("heads", "head_dim", "embed"),
    "query/bias": ("heads", "head_dim"),
    "key/bias": ("kv_heads", "head_dim"),
    "value/bias": ("kv_heads", "head_dim"),
    "out/bias": (None,),
    "attention/sinks": ("heads",),
    "qk_scale/scale": ("kv_heads", None),
    "gate/kernel": ("embed", "mlp"),
    "up/kernel": ("embed", "mlp"),
    "down/kernel": ("mlp", "embed"),
    "gate/bias": ("mlp",),
    "up/bias": ("mlp",),
    "down/bias": (None,),
    # The router's result is needed whole by every token.
    "router/kernel": ("embed", None),
    "router/bias": (None,),
    "shared_gate/kernel": ("embed", None),
    "shared_gate/bias": (None,),
    "expert_gate/kernel": ("experts", "embed", "mlp"),
    "expert_up/kernel": ("experts", "embed", "mlp"),
    "expert_down/kernel": ("experts", "mlp", "embed"),
    "expert_gate/bias": ("experts", "mlp"),
    "expert_up/bias": ("experts", "mlp"),
    "expert_down/bias": ("experts", None),
}


def logical_axes(path: tuple[str, ...], ndim: int) -> tuple[str | None, ...]:
    """The logical axes of the parameter, or optimizer moment, at this path.

    Raises:
      KeyError: a matrix that PARAMETER_AXES does not name.
    """
    in_run = any(part.startswith("run_") for part in path)
    layers = ("layers",) if in_run else ()
    axes = PARAMETER_AXES.get("/".join(path[-2:]))
    if axes is not None:
        return layers + axes
    if ndim == 0:
        return ()
    if ndim == len(layers):
        return layers
    is_norm = path[-2:-1] != () and path[-2].endswith("_norm")  # some have a vector for each head
    if ndim == len(layers) + 1 or is_norm:
        return (*layers, *(None,) * (ndim - len(layers)))
    name = "/".join(path)
    raise KeyError(f"no logical axes for the parameter {name}: mesh.parameter_axes.PARAMETER_AXES must name it")
