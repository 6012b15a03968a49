"""LoRA and its kin in the ranks: what files and graphs say of weights, laid beside the layers that a rank holds."""
