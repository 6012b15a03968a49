"""How one prediction is shared by the ranks: one file per method, each written against the block view of a family."""
