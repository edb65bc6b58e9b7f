"""The order of a run: requirements, stages, scores, budgets, report, push; and the commands on a finished run."""
