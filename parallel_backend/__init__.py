"""What runs in every rank of the sidecar: the protocol, the mesh, the engine. Knows neither ComfyUI nor the launcher."""
