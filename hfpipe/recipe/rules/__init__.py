"""Rules of a recipe that its types cannot say: which keys go together, and which values fit each other."""
