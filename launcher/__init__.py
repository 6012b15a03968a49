"""What runs in the host process: starts, watches and stops the sidecar, and talks to it."""
