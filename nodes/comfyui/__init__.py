"""What needs ComfyUI's own code: the host, and a MODEL whose network asks the ranks."""
