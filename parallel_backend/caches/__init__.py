"""Step caches: which blocks of a model are computed in an evaluation, and which results are used again."""
