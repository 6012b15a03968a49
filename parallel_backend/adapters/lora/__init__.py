"""LoRA and its kin: files, deltas, and the layers that they change."""
