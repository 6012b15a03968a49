"""Autoencoders in the ranks: loading them, and turning latents into pictures across all ranks and back."""
