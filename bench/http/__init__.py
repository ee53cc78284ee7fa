"""Dropserve's HTTP beside other ways to serve the same network: `python -m bench.http`."""
