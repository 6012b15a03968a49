"""The one place where queries, keys and values pass: kernels, and attention over sequence-parallel ranks."""
