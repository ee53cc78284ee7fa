"""The command line, `dropserve`: `main` assembles the commands."""
