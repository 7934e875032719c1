"""The command line: `parser.py` reads it, `commands/` holds one file for each command."""
