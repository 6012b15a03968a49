"""What this machine, or the container that it pretends to be, gives: time, memory, cores."""
