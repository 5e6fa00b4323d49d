"""Faults in what other architectures need: scales, caps, shared norms, activations and kinds of experts."""

from planted_faults.fault import Fault

_OUTER = "model/test_outer_parts.py::test_the_decoder_is_the_one_in_numpy"
_FORMS = "equivalence/test_equivalence.py::test_all_forms_compute_the_same_logits"
_KINDS = "model/test_feed_forward_kinds.py"

ARCHITECTURES = (
    Fault(
        name="norms_of_heads_forget_that_1_is_added",
        file="model/attention.py",
        right="            scale = plus_one(scale, self.dtype)\n",
        wrong="            scale = scale\n",
        tests=(_OUTER,),
    ),
    Fault(
        name="logits_are_capped_before_they_are_scaled",
        file="model/embedding.py",
        right="            logits = cap * jnp.tanh(logits / cap)\n",
        wrong="            logits = cap * (self.scale or 1) * jnp.tanh(logits / (self.scale or 1) / cap)\n",
        tests=(_OUTER,),
    ),
    Fault(
        name="the_layer_scale_stands_before_the_branch_norm",
        file="model/formula.py",
        right="""    branch = norms.branch(f(times(scales.input, norms.pre(x))))
    if placement.joins == "chord":
        return Streams(main=norms.post(_along_chord(r, branch, norms.layer_scale, scales.branch)))
    added = norms.layer_scale(branch)
""",
        wrong="""    added = norms.branch(norms.layer_scale(f(times(scales.input, norms.pre(x)))))
""",
        tests=(_OUTER,),
    ),
    Fault(
        name="a_tied_head_of_authors_is_not_compared",
        file="interop/authors/reading.py",
        right="if head in self._arrays and not same_bits(",
        wrong="if head in self._arrays and None is same_bits(",
        tests=("interop/test_authors_files.py::test_a_tied_models_own_copy_of_the_head_must_be_the_embedding",),
    ),
    Fault(
        name="prefixes_of_some_names_are_taken_off",
        file="interop/authors/projects.py",
        right="all(name.startswith(prefix) for name in names)",
        wrong="any(name.startswith(prefix) for name in names)",
        tests=("interop/test_authors_files.py::test_prefixes_that_are_not_known_or_not_of_all_names_are_named",),
    ),
    Fault(
        name="a_shared_norm_is_two_norms",
        file="model/block.py",
        right="if self.placement.shared_pre_norm:",
        wrong="if False:",
        tests=("model/test_outer_parts.py::test_a_shared_norm_is_one_set_of_parameters",),
    ),
    Fault(
        name="clamped_experts_do_not_add_1_to_up",
        file="kernels/swiglu.py",
        right="jax.nn.sigmoid(clamp.alpha * gated) * (upped + 1)",
        wrong="jax.nn.sigmoid(clamp.alpha * gated) * upped",
        tests=(_KINDS,),
    ),
    Fault(
        name="blocked_experts_are_differentiated_as_if_not_clamped",
        file="kernels/blocked_experts.py",
        right="    if kernels.clamp is None:\n",
        wrong="    if True:\n",
        tests=(f"{_KINDS}::test_clamped_experts_and_their_gradients_are_the_same_by_every_dispatch",),
    ),
    Fault(
        name="dense_layers_have_the_width_of_experts",
        file="model/block.py",
        right="mlp_dim=config.dense_width",
        wrong="mlp_dim=config.mlp_dim",
        tests=(f"{_KINDS}::test_dense_layers_are_runs_of_their_own",),
    ),
    Fault(
        name="a_block_has_experts_wherever_the_model_has_some",
        file="model/layers.py",
        right="        return self.run_has_experts\n",
        wrong="        return self.config.num_experts > 0\n",
        tests=(f"{_KINDS}::test_dense_layers_are_runs_of_their_own",),
    ),
    Fault(
        name="a_scale_stored_less_1_is_folded_as_it_is",
        file="equivalence/transforms.py",
        right="        vector = 1 + vector\n",
        wrong="        vector = 0 + vector\n",
        tests=(_FORMS,),
    ),
    Fault(
        name="layer_scale_is_not_folded_into_output_biases",
        file="equivalence/plain_models.py",
        right='(f"{projection}/kernel", f"{projection}/bias")',
        wrong='(f"{projection}/kernel",)',
        tests=(_FORMS,),
    ),
    Fault(
        name="the_norm_of_the_token_table_forgets_the_factor_before_it",
        file="equivalence/plain_models.py",
        right="        wide = config.embedding_scale * wide\n",
        wrong="        wide = 1 * wide\n",
        tests=(_FORMS,),
    ),
)
