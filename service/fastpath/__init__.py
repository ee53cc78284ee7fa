"""Optional: answers small-PNG requests without ASGI. Nothing but `server.py` imports it."""
