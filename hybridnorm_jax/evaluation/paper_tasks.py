"""The tasks of the HybridNorm paper. Nothing is imported here: shell completion reads it."""

from typing import Any

PAPER = "hybridnorm"
# The eight tasks of which the HybridNorm paper (2503.04598) gives the average, each with the metric that OLMo's own
# evaluation, which the paper used, takes of it: len_norm there is acc_norm here.
PAPER_TASKS = {
    "basic_arithmetic": "acc",
    "hellaswag": "acc_norm",
    "sciq": "acc",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc",
    "piqa": "acc_norm",
    "openbookqa": "acc_norm",
    "copa": "acc",
}
# OLMo's, with the prompt of ARC; the harness has no such task.
OWN_TASKS: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {
        "task": "basic_arithmetic",
        "dataset_path": "allenai/basic_arithmetic",
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
}
