"""Planted faults of branches that grow with the training step, and of steps on a sphere."""

from planted_faults.fault import Fault

GROWING_AND_SPHERE = (
    Fault(
        name="branches_grow_beyond_their_size",
        file="model/formula.py",
        right="jnp.minimum(jnp.asarray(step, lengths.dtype) / lengths, 1)",
        wrong="jnp.asarray(step, lengths.dtype) / lengths",
        tests=("model/test_ramps.py::test_a_step_is_one_more_factor_of_every_branch",),
    ),
    Fault(
        name="all_layers_grow_as_fast_as_the_first",
        file="model/layers.py",
        right="[run.start : run.start + run.length]",
        wrong="[: run.length]",
        tests=("model/test_ramps.py::test_a_ramp_goes_on_from_run_to_run",),
    ),
    Fault(
        name="training_stays_at_the_first_step",
        file="training/step.py",
        right="partial(objective, step=state.step)",
        wrong="partial(objective, step=0 * state.step)",
        tests=("training/test_growing_branches.py::test_training_takes_the_scales_of_each_step",),
    ),
    Fault(
        name="a_checkpoint_is_read_with_all_branches_grown",
        file="training/run_directory.py",
        right="import_these=plugins).at_step(step)",
        wrong="import_these=plugins).at_step(10**6)",
        tests=("training/test_growing_branches.py::test_a_checkpoint_has_the_scales_of_its_own_step",),
    ),
    Fault(
        name="steps_along_the_chord_go_back_where_their_scale_is_negative",
        file="model/block.py",
        right="times(jnp.abs(stored(x.shape[-1])), x)",
        wrong="times(stored(x.shape[-1]), x)",
        tests=("interop/test_authors.py::test_a_model_of_the_authors_is_reproduced",),
    ),
    Fault(
        name="q_and_k_are_scaled_before_the_rotation",
        file="model/attention.py",
        right="inputs, preparation = self._on_sphere(prepared(inputs, preparation), x.shape[-1]), Preparation()",
        wrong="inputs = self._on_sphere(inputs, x.shape[-1])",
        tests=("interop/test_authors.py::test_a_model_of_the_authors_is_reproduced",),
    ),
    Fault(
        name="matrices_are_normalized_along_their_last_axis",
        file="training/unit_matrices.py",
        right='axis = logical_axes(names, leaf.ndim).index("embed")',
        wrong="axis = -1",
        tests=("model/test_sphere.py",),
    ),
    Fault(
        name="a_step_on_the_sphere_keeps_its_part_along_the_stream",
        file="model/formula.py",
        right="    ahead -= (wide * ahead).sum(-1, keepdims=True) / square * wide\n",
        wrong="",
        tests=(
            "model/test_sphere.py::test_geonorm_keeps_the_length_of_every_token_and_goes_as_far_as_the_branch_is_long",
        ),
    ),
)
