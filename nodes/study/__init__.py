"""What a study of a model finds: where its results change little from step to step, and what follows from that."""
