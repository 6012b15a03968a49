"""Serves requests on every rank: loads models, samples, encodes and decodes."""
