"""From HTTP to inference and back: routes, and what they read and write."""
