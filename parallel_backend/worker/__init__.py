"""A rank: its control loop, its socket, and what watches it."""
