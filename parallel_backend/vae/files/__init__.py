"""Which autoencoder a file is, and its names in diffusers."""
