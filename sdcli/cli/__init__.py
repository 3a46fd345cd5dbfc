"""The command line: Typer alone. What a command does is in the story it calls."""
