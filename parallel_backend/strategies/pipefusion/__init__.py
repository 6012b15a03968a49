"""PipeFusion: patches of the latent through stages of the model."""
