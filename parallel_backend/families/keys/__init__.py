"""One key table a family: the names in its files and the names in diffusers."""
