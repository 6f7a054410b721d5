"""The command line: arguments, commands, console."""
