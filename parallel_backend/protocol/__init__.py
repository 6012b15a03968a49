"""What travels between the graph and the sidecar: frames (the bytes) and messages (their meaning)."""
