"""The stream: lanes and windows of packed rows, which resume at their place."""
