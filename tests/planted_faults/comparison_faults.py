"""Faults in how a comparison is made, which would favor a scheme or compare what cannot be compared."""

from planted_faults.fault import Fault

COMPARISONS = (
    Fault(
        name="runs_that_clip_otherwise_share_a_step",
        file="training/program.py",
        right='    "optimizer.final_ratio",\n',
        wrong='    "optimizer.final_ratio",\n    "optimizer.clip",\n',
        tests=("training/test_shared_programs.py::test_what_is_compiled_is_not_shared",),
    ),
    Fault(
        name="a_shared_step_keeps_the_numbers_of_the_first_run",
        file="training/program.py",
        right='        other.__dict__.pop("numbers", None)\n',
        wrong="",
        tests=("training/test_shared_programs.py::test_numbers_are_arguments_of_one_compiled_step",),
    ),
    Fault(
        name="a_loop_counts_once",
        file="training/arithmetic.py",
        right="return sum(inner) * _times(equation)",
        wrong="return sum(inner)",
        tests=("training/test_arithmetic.py",),
    ),
    Fault(
        name="a_sweep_stops_at_the_edge_of_its_grid",
        file="lab/sweep.py",
        right="MOST_EXTENSIONS = 2",
        wrong="MOST_EXTENSIONS = 0",
        tests=("lab/test_sweep.py::test_the_best_rate_is_found",),
    ),
    Fault(
        name="a_rate_is_chosen_with_the_seeds_that_are_compared",
        file="lab/trainer.py",
        right='trained(rates, asked.options.sweep_seeds, "sweep")',
        wrong='trained(rates, asked.options.seeds, "sweep")',
        tests=("lab/test_compare.py::test_a_sweep_has_seeds_of_its_own_and_the_others_get_the_best_rate",),
    ),
    Fault(
        name="pairs_may_read_other_data",
        file="lab/pairing.py",
        right='if one["batches"][step] != other["batches"][step]:',
        wrong="if False:",
        tests=("lab/test_pairing.py",),
    ),
    Fault(
        name="layers_are_paired_by_their_place_in_a_group",
        file="lab/pairing.py",
        right="_name((str(start + index), *path[1:])",
        wrong="_name((str(index), *path[1:])",
        tests=("lab/test_pairing.py",),
    ),
)
