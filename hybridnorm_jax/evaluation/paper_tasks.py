"""The tasks of the HybridNorm paper. Nothing is imported here: shell completion reads it."""

from typing import Any

PAPER = "hybridnorm"
# The HybridNorm paper (2503.04598) names ten tasks and gives an average of eight. These eight, and the metric of each
# (that of OLMo's own evaluation, whose len_norm is acc_norm here), were written from memory,
# not looked up in the paper.
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
