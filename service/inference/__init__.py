"""Models, their threads and queue; what is served and by which processes."""
