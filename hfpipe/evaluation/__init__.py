"""Evaluation: the suites of a recipe, what a model answers to their rows, and the metrics of the answers."""
