"""From a file to parameters on a device, one shared mapping for all ranks of a host."""
