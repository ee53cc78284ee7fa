"""Traffic: an HTTP service over what `models` has learned, its client and its command line."""
