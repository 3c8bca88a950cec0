"""The command line: one file a group of commands, each with what it prints. The only room that prints."""
