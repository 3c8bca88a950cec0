"""The command line: one file for each group of commands and their output. No other room prints."""
