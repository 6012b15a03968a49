"""Tokens of a latent: their grid, their positions, and which rank holds which."""
