"""Cells of a latent."""

from __future__ import annotations

CELL = 8
"""Pixels per latent cell, in both directions."""
