"""The command line: one file per command, and `render`, which turns values into text."""
