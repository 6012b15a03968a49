"""The way to the sidecar, and what runs in it."""
