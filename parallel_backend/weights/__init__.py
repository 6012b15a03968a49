"""Loads a file's parameters onto a device, through one shared mapping for all ranks of a host."""
