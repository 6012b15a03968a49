"""Kills and stops the processes of a sidecar at every moment, and counts what that costs."""
