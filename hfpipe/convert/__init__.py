"""A recipe written from something else: another tool's config, or a file of data and a few answers."""
