"""The Perceiver as a command-line toolkit."""
