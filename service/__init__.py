"""The HTTP service for `models`, its client and its command line."""
