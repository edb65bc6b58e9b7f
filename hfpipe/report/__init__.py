"""Views of a run: they read the scorecard and the run folder, and compute nothing."""
