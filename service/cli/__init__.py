"""What is behind the command line: the commands that ask a running service, and how they look."""
