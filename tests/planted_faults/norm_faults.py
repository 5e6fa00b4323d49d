"""Faults in the kinds of norms, and in what is known of them elsewhere."""

from planted_faults.fault import Fault

_EVERY_KIND = "model/test_every_norm_kind.py"
_KINDS = "model/test_norm_kinds.py"
_EXPORTED = "interop/test_exported_logits.py::test_float32_is_equal_up_to_rounding"

NORMS = (
    Fault(
        name="alpha_starts_everywhere_as_in_attention",
        file="model/config_norms.py",
        right="starts[NORM_PLACES.index(place)]",
        wrong="starts[0]",
        tests=(f"{_KINDS}::test_parameters_start_as_the_keys_say",),
    ),
    Fault(
        name="alpha_that_no_norm_reads_is_taken",
        file="model/config_norms.py",
        right="name in names or not starts, right)",
        wrong="True, right)",
        tests=(f"{_KINDS}::test_what_a_kind_does_not_have_is_refused",),
    ),
    Fault(
        name="the_gate_of_a_norm_is_as_exact_as_the_device_likes",
        file="model/norm_functions.py",
        right="partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)",
        wrong="partial(jnp.matmul)",
        tests=(f"{_EVERY_KIND}::test_no_product_of_a_norm_is_left_to_the_rounding_of_a_device",),
    ),
    Fault(
        name="dyt_rounds_before_it_multiplies_by_its_scale",
        file="model/norm_functions.py",
        right="    return _affine(jnp.tanh(alpha.astype(wide.dtype) * wide), scale, bias, x.dtype)\n",
        wrong="    return _affine(jnp.tanh(alpha.astype(wide.dtype) * wide).astype(x.dtype), scale, bias, x.dtype)\n",
        tests=(f"{_EVERY_KIND}::test_bfloat16_is_one_rounding_of_the_exact_norm",),
    ),
    Fault(
        name="shapes_are_those_of_an_earlier_kind_of_the_name",
        file="model/abstract_params.py",
        right="(plain.scheme_rule, *kinds)",
        wrong="(plain.scheme_rule,)",
        tests=(f"{_KINDS}::test_shapes_are_those_of_the_kind_that_has_the_name_now",),
    ),
    Fault(
        name="a_plan_of_an_edited_plugin_is_taken_for_its_own",
        file="planning/stored_plans.py",
        right='    settings["plugins"] = [plugin.digest for plugin in plugins_of(config.run.plugins)]\n',
        wrong="",
        tests=("planning/test_search.py::test_an_edited_plugin_is_another_plan",),
    ),
    Fault(
        name="positions_are_not_scaled_with_the_embedding_in_torch",
        file="interop/pytorch/modeling_hybridnorm.py",
        right="self.embedding_scale(self.with_positions(times(self.config.embedding_scale, x), position_ids))",
        wrong="self.with_positions(self.embedding_scale(times(self.config.embedding_scale, x)), position_ids)",
        tests=(_EXPORTED,),
    ),
    Fault(
        name="the_gate_of_a_norm_is_rounded_under_autocast",
        file="interop/pytorch/norms_hybridnorm.py",
        right="        with torch.autocast(y.device.type, enabled=False):\n",
        wrong="        if True:\n",
        tests=("interop/test_exported_training.py::test_the_gate_of_a_norm_is_not_rounded_under_autocast",),
    ),
)
