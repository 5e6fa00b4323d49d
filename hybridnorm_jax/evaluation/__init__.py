"""How well a model predicts text that is given, and what it answers: validation sets, and tasks of the harness.

`perplexity` scores what it is handed: a function that sums losses, and windows of tokens. `token_requests` says what of
a continuation is read at once, `text_requests` how texts become tokens, `token_scores` computes their probability, and
`answers` has questions answered. `tasks` and `lm_eval_model` are the two sides of the LM Evaluation Harness. What lives
elsewhere: the function that sums losses (training/program.py), a run's model for tasks (training/task_model.py), the
restoring of a run that is to be scored (commands/scored_run.py), and the writing of text (generation/).
"""
