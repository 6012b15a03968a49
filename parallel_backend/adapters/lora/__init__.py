"""LoRA, LoHa, LoKr and whole differences: their files, deltas, and the layers that they change."""
