"""Faults in training several runs at once, where one run would get what belongs to another."""

from planted_faults.fault import Fault

_EQUAL = "lab/test_together.py::test_losses_gradients_scores_and_parameters_are_those_of_single_runs"
TOGETHER = (
    Fault(
        name="all_runs_of_a_group_have_the_numbers_of_the_first",
        file="lab/together.py",
        right="[run.program.numbers for run in runs]",
        wrong="[runs[0].program.numbers for _ in runs]",
        tests=(_EQUAL,),
    ),
    Fault(
        name="all_runs_of_a_group_are_saved_as_the_first",
        file="training/grouped_steps.py",
        right="return self._of_run(states, index)",
        wrong="return self._of_run(states, 0)",
        tests=(_EQUAL,),
    ),
)
