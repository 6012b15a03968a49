"""A family that nobody trained, with all that the contract of a family has to hold. It proves the contract."""
