"""Cleaning: rules on texts, near duplicates, and rows that stand in a suite too."""
