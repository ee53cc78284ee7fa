"""The fast path: complete small-PNG requests are answered without ASGI; optional."""
