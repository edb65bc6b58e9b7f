"""Rules of a recipe that its types cannot say: which words go together, and which values fit each other."""
