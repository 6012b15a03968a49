"""What runs in every rank of the sidecar: protocol, mesh, engine. Knows neither ComfyUI nor the launcher."""
