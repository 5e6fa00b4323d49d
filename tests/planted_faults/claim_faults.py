"""Faults in how the papers' claims are measured, which would give a wrong verdict."""

from planted_faults.fault import Fault

CLAIMS = (
    Fault(
        name="elasticities_of_matrices_that_stay_as_they_are",
        file="lab/claims/coupling.py",
        right="jax.grad(loss)({**params, **scaled})",
        wrong="jax.grad(loss)(params)",
        tests=("lab/test_claims.py::test_elasticities_are_those_of_a_computation_by_hand",),
    ),
    Fault(
        name="lower_counts_as_higher",
        file="lab/claims/at_start.py",
        right="sign * (mean - against)",
        wrong="abs(mean - against)",
        tests=("lab/test_claims.py::test_a_claim_about_two_schemes_turns_with_them",),
    ),
    Fault(
        name="the_pre_ln_model_is_compared_with_itself",
        file="lab/claims/training.py",
        right="losses(dataclasses.replace(config, train=section))",
        wrong="losses(config)",
        tests=("lab/test_claims.py::test_a_conversion_that_leaves_the_mean_in_trains_otherwise",),
    ),
    Fault(
        name="a_time_over_its_own",
        file="lab/claims/speed.py",
        right="values / seconds[baseline]",
        wrong="seconds[baseline] / values",
        tests=("lab/test_claims.py::test_a_slower_step_is_noticed",),
    ),
)
