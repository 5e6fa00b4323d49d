"""Faults that give wrong numbers without a word, each with the tests that must fail where it is planted."""

from planted_faults.architecture_faults import ARCHITECTURES
from planted_faults.claim_faults import CLAIMS
from planted_faults.comparison_faults import COMPARISONS
from planted_faults.data_faults import DATA_ORDER
from planted_faults.fault import Fault
from planted_faults.norm_faults import NORMS
from planted_faults.sphere_faults import GROWING_AND_SPHERE
from planted_faults.task_faults import TASKS
from planted_faults.together_faults import TOGETHER

MODEL = (
    Fault(
        name="embedding_has_no_dropout",
        file="model/decoder.py",
        right="self.dropout(stream, deterministic=deterministic)",
        wrong="self.dropout(stream, deterministic=True)",
        tests=("model/test_layer_keys.py::test_the_embedding_is_dropped",),
    ),
    Fault(
        name="rotation_in_the_compute_dtype",
        file="model/rotation.py",
        right="""    dtype = wide_dtype(dtype)
    wavelengths""",
        wrong="    wavelengths",
        tests=("model/test_decoder.py::test_a_bfloat16_model_rotates_in_float32",),
    ),
    Fault(
        name="every_layer_has_the_same_keys",
        file="model/layers.py",
        right="jax.vmap(partial(jax.random.fold_in, key))(layers)",
        wrong="jax.vmap(partial(jax.random.fold_in, key))(0 * layers)",
        tests=("model/test_layer_keys.py::test_every_layer_and_every_branch_has_a_dropout_mask_of_its_own",),
    ),
    Fault(
        name="the_keys_of_a_layer_depend_on_its_run",
        file="model/layers.py",
        right="jax.vmap(partial(jax.random.fold_in, key))(layers)",
        wrong="jax.vmap(partial(jax.random.fold_in, key))(layers - run.start)",
        tests=("model/test_layer_keys.py::test_schemes_of_every_grouping_start_from_the_same_matrices",),
    ),
    Fault(
        name="scales_rounded_before_the_product",
        file="model/formula.py",
        right="scale.astype(wide_dtype(x.dtype)) * widened(x)",
        wrong="scale.astype(x.dtype).astype(wide_dtype(x.dtype)) * widened(x)",
        tests=("model/test_block.py::test_scales_are_multiplied_in_float32_and_rounded_once",),
    ),
    Fault(
        name="epsilon_outside_the_root",
        file="model/norm_functions.py",
        right="wide * jax.lax.rsqrt(mean_square + eps)",
        wrong="wide / (jnp.sqrt(mean_square) + eps)",
        tests=("model/test_norms.py",),
    ),
    Fault(
        name="crmsnorm_divides_by_the_stored_width",
        file="model/norm_functions.py",
        right="width = stored + 1 if width is None else width",
        wrong="width = stored if width is None else width",
        tests=("model/test_norms.py",),
    ),
    Fault(
        name="router_in_the_compute_dtype",
        file="model/moe.py",
        right="dtype=jnp.promote_types(self.dtype, jnp.float32),",
        wrong="dtype=self.dtype,",
        tests=("model/test_moe.py",),
    ),
    Fault(
        name="balance_bias_enters_the_weights",
        file="model/moe.py",
        right="return jnp.take_along_axis(p, chosen, axis=-1), chosen",
        wrong="return jnp.take_along_axis(scores, chosen, axis=-1), chosen",
        tests=("model/test_moe.py",),
    ),
    Fault(
        name="balance_loss_counts_first_choices_only",
        file="model/moe.py",
        right="(chosen[..., None] == jnp.arange(experts)).mean((0, 1, 2)",
        wrong="(chosen[..., :1, None] == jnp.arange(experts)).mean((0, 1, 2)",
        tests=("model/test_moe.py",),
    ),
    Fault(
        name="gradient_of_the_embedding_summed_in_the_compute_dtype",
        file="model/embedding.py",
        right="jnp.take(table, ids, axis=0)",
        wrong="jnp.take(table.astype(self.dtype), ids, axis=0)",
        tests=("model/test_decoder.py::test_the_gradient_of_the_embedding_is_summed_in_float32",),
    ),
    Fault(
        name="softmax_of_attention_in_the_compute_dtype",
        file="kernels/blockwise_attention.py",
        right="weights = jnp.exp(scores - highest)",
        wrong="weights = jnp.exp((scores - highest).astype(inputs.query.dtype)).astype(scores.dtype)",
        tests=("kernels/test_attention_backends.py",),
    ),
    Fault(
        name="softmax_over_a_split_sequence_in_the_compute_dtype",
        file="kernels/split_sequence.py",
        right="weights = jnp.exp(scores - highest[..., None])",
        wrong="weights = jnp.exp((scores - highest[..., None]).astype(inputs.query.dtype)).astype(scores.dtype)",
        tests=("kernels/test_split_sequence.py",),
    ),
    Fault(
        name="initial_weights_cut_at_two_deviations",
        file="model/initializers.py",
        right="truncated_normal(key, -3, 3,",
        wrong="truncated_normal(key, -2, 2,",
        tests=("model/test_initializers.py",),
    ),
)

LOSS = (
    Fault(
        name="targets_without_weight_are_counted",
        file="model/loss.py",
        right="weight=jnp.sum(weights),",
        wrong="weight=jnp.sum(jnp.ones_like(weights)),",
        tests=("model/test_loss.py",),
    ),
    Fault(
        name="z_loss_ignores_weights",
        file="model/loss.py",
        right="jnp.sum(weights * jnp.square(log_z))",
        wrong="jnp.sum(jnp.square(log_z))",
        tests=("model/test_loss.py",),
    ),
    Fault(
        name="loss_in_the_compute_dtype",
        file="kernels/token_logits.py",
        right="    logits = widened(logits)\n",
        wrong="",
        tests=("model/test_loss.py",),
    ),
    Fault(
        name="head_read_in_bfloat16_once_for_all_chunks",
        file="model/loss.py",
        right="gathered = nn.with_logical_constraint(params[module][name], axes)",
        wrong="gathered = nn.with_logical_constraint(params[module][name].astype(jnp.bfloat16), axes)",
        tests=("training/test_step.py::test_the_chunked_loss_trains_the_same",),
    ),
    Fault(
        name="gradient_of_the_head_summed_over_chunks_in_the_compute_dtype",
        file="model/loss.py",
        right="gathered = nn.with_logical_constraint(params[module][name], axes)",
        wrong="""dtype = params[module][name].dtype if config.tie_embeddings else config.dtype
    gathered = nn.with_logical_constraint(params[module][name].astype(dtype), axes)""",
        tests=("training/test_step.py::test_the_gradient_of_the_head_is_summed_over_chunks_in_float32",),
    ),
    Fault(
        name="gradient_of_a_tied_head_summed_over_chunks_in_the_compute_dtype",
        file="model/loss.py",
        right="gathered = nn.with_logical_constraint(params[module][name], axes)",
        wrong="""dtype = config.dtype if config.tie_embeddings else params[module][name].dtype
    gathered = nn.with_logical_constraint(params[module][name].astype(dtype), axes)""",
        tests=("training/test_step.py::test_the_gradient_of_the_head_is_summed_over_chunks_in_float32",),
    ),
    Fault(
        name="perplexity_is_the_mean_of_batches",
        file="evaluation/perplexity.py",
        right="""        nll += np.asarray(sums.nll, np.float64)
        weight += np.asarray(sums.weight, np.float64)""",
        wrong="""        nll += np.asarray(sums.nll, np.float64) / np.asarray(sums.weight, np.float64)
        weight += 1.0""",
        tests=("evaluation/test_perplexity.py",),
    ),
)

DATA = (
    Fault(
        name="a_token_between_two_rows_is_no_target",
        file="data/rows/windows.py",
        right="start = index * self._stride",
        wrong="start = index * (self._stride + 1)",
        tests=("data/rows/test_windows.py",),
    ),
    Fault(
        name="the_number_of_processes_changes_the_microbatches",
        file="data/pipeline.py",
        right=".reshape(accumulation, share.count, local)[:, share.number]",
        wrong=".reshape(share.count, accumulation, local)[share.number]",
        tests=("data/test_pipeline.py",),
    ),
    Fault(
        name="the_last_batch_of_validation_repeats_rows",
        file="data/pipeline.py",
        right="return _stack(rows + [blank] * missing)",
        wrong="return _stack(rows + [windows[0]] * missing)",
        tests=("data/test_pipeline.py",),
    ),
    Fault(
        name="a_resumed_run_begins_with_the_first_batch",
        file="training/resume.py",
        right='    iterator.set_state(data_state["iterator"])\n',
        wrong="",
        tests=("training/test_resume.py::test_stopped_and_resumed_equals_uninterrupted_bit_for_bit",),
    ),
)

ACCUMULATION = (
    Fault(
        name="mean_of_the_means_of_microbatches",
        file="training/step.py",
        right="totals, sown, grads = gradient(microbatch, jax.random.fold_in(key, number))",
        wrong="""totals, sown, grads = gradient(microbatch, jax.random.fold_in(key, number))
        grads = _divide(grads, totals.loss.weight * count / batch["weights"].sum())""",
        tests=("training/test_step.py::test_four_microbatches_equal_one_large_batch",),
    ),
    Fault(
        name="every_microbatch_has_the_same_dropout",
        file="training/step.py",
        right="gradient(microbatch, jax.random.fold_in(key, number))",
        wrong="gradient(microbatch, key)",
        tests=("training/test_step.py::test_dropout_differs_between_steps_and_microbatches",),
    ),
    Fault(
        name="every_step_has_the_same_dropout",
        file="training/step.py",
        right="key = jax.random.fold_in(jax.random.wrap_key_data(numbers.dropout_seed), state.step)",
        wrong="key = jax.random.wrap_key_data(numbers.dropout_seed)",
        tests=("training/test_step.py::test_dropout_differs_between_steps_and_microbatches",),
    ),
    Fault(
        name="gradients_of_microbatches_summed_in_bfloat16",
        file="training/step.py",
        right="return jax.tree.map(jnp.add, carry, (totals, grads)), sown",
        wrong="""rounded = jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(g.dtype), grads)
        return jax.tree.map(jnp.add, carry, (totals, rounded)), sown""",
        tests=("training/test_step.py::test_four_microbatches_equal_one_large_batch",),
    ),
)

MOMENTS = (
    Fault(
        name="decay_rates_of_the_moments_exchanged",
        file="training/optimizers/directions.py",
        right="scale_by_adam(b1=config.b1, b2=config.b2",
        wrong="scale_by_adam(b1=config.b2, b2=config.b1",
        tests=("training/test_optimizer.py",),
    ),
    Fault(
        name="updates_are_clipped_and_not_gradients",
        file="training/optimizers/chain.py",
        right="optax.chain(*clip, direction, decay, rate)",
        wrong="optax.chain(direction, *clip, decay, rate)",
        tests=("training/test_optimizer.py",),
    ),
    Fault(
        name="biases_decay",
        file="training/optimizers/decay.py",
        right="return in_group and config.decay_norms_and_biases",
        wrong='return name == "bias" or (in_group and config.decay_norms_and_biases)',
        tests=("training/test_weight_decay.py::test_what_decays",),
    ),
    Fault(
        name="learned_scales_decay_as_norms_do",
        file="training/optimizers/decay.py",
        right='name in ("bias", "sinks")',
        wrong='name in ("bias", "sinks", "scale")',
        tests=("training/test_weight_decay.py::test_learned_scales_in_blocks_never_decay",),
    ),
    Fault(
        name="stacked_numbers_are_taken_for_matrices",
        file="training/optimizers/decay.py",
        right="np.ndim(leaf) - is_stacked > 1",
        wrong="np.ndim(leaf) > 1",
        tests=("training/test_weight_decay.py::test_numbers_of_norms_never_decay_and_their_scales_do",),
    ),
    Fault(
        name="the_balance_bias_decays",
        file="training/optimizers/decay.py",
        right='name in ("bias", "sinks")',
        wrong='name in ("bias", "sinks", "balance_bias")',
        tests=("training/test_moe_training.py::test_the_balance_bias_moves_by_its_own_rule_alone",),
    ),
    Fault(
        name="the_warm_up_begins_with_a_rate_of_zero",
        file="training/optimizers/schedules.py",
        right="made = count + 1",
        wrong="made = count",
        tests=("training/test_step.py::test_schedules",),
    ),
    Fault(
        name="a_skipped_step_moves_the_moments",
        file="training/step.py",
        right="params, opt_state, average = keep_where(",
        wrong="params, _, average = keep_where(",
        tests=("training/test_anomalies.py", "training/test_step.py"),
    ),
    Fault(
        name="layers_are_orthogonalized_as_if_they_were_one_matrix",
        file="training/optimizers/muon.py",
        right="matrices = x.reshape((*batch, *axes.sizes(x.shape)))",
        wrong="matrices = x.reshape((-1, axes.sizes(x.shape)[1]))",
        tests=("training/test_optimizers.py::test_steps_are_those_of_the_reference_implementation",),
    ),
    Fault(
        name="adafactor_clips_all_layers_together",
        file="training/optimizers/adafactor.py",
        right="within = tuple(range(len(batch_axes(path, gradient.ndim)), gradient.ndim))",
        wrong="within = tuple(range(gradient.ndim))",
        tests=("training/test_optimizers.py::test_steps_are_those_of_the_reference_implementation",),
    ),
    Fault(
        name="bfloat16_moments_are_cut_off",
        file="training/optimizers/moments.py",
        right="jax.lax.shift_right_logical(bits + noise, jnp.uint32(16))",
        wrong="jax.lax.shift_right_logical(bits + 0 * noise, jnp.uint32(16))",
        tests=("training/test_optimizers.py",),
    ),
    Fault(
        name="a_skipped_loss_is_remembered",
        file="training/anomalies.py",
        right="losses=jnp.where(skip, before.losses, before.losses.at[before.made % window].set(loss)),",
        wrong="losses=before.losses.at[before.made % window].set(loss),",
        tests=("training/test_anomalies.py",),
    ),
)

SHARDING = (
    Fault(
        name="every_process_reads_the_first_share",
        file="mesh/batch_shares.py",
        right="return BatchShare(number=stretches.index(own), count=len(stretches))",
        wrong="return BatchShare(number=0, count=len(stretches))",
        tests=("mesh/test_processes.py::test_no_process_reads_the_rows_of_another",),
    ),
    Fault(
        name="a_split_sequence_forgets_documents",
        file="kernels/split_sequence.py",
        right="visible = same if visible is None else visible & same",
        wrong="pass",
        tests=("kernels/test_split_sequence.py",),
    ),
    Fault(
        name="experts_of_the_next_device_are_taken",
        file="kernels/split_experts.py",
        right="chosen = chosen - len(kernels.gate) * jax.lax.axis_index(split.experts)",
        wrong="chosen = chosen - len(kernels.gate) * (jax.lax.axis_index(split.experts) ^ 1)",
        tests=("kernels/test_split_experts.py",),
    ),
    Fault(
        name="split_hidden_layers_are_not_summed",
        file="kernels/split_experts.py",
        right="""    if summed:
        y = jax.lax.psum(y, summed)
""",
        wrong="",
        tests=("kernels/test_split_experts.py",),
    ),
    Fault(
        name="balance_biases_of_the_first_run_for_all_layers",
        file="training/router_balance.py",
        right="first = layers.stop",
        wrong="first = 0",
        tests=("training/test_moe_training.py::test_balance_improves_in_100_steps_from_a_skewed_start",),
    ),
)

FAULTS = (
    MODEL
    + LOSS
    + DATA
    + ACCUMULATION
    + MOMENTS
    + SHARDING
    + TASKS
    + ARCHITECTURES
    + NORMS
    + GROWING_AND_SPHERE
    + CLAIMS
    + COMPARISONS
    + DATA_ORDER
    + TOGETHER
)
