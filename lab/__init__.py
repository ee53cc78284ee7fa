"""Experiments that answer questions about dropout: `dropserve lab`, docs/results.md."""
