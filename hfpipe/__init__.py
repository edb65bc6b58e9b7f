"""hfpipe: one recipe from raw web text to a scored adapter on the Hub."""

__version__ = "0.1.0"
