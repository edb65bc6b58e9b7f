"""Scores: one number with its error, the scorecard, gain against loss, and the words for them."""
