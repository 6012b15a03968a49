"""One file per model family: a diffusers transformer seen as `embed -> blocks -> head` over tokens.

A family is its view (`flux.py`, imported in ranks alone), its data (`keys/flux.py`, one `FamilySpec`) and one row in
`registry.FAMILIES`. All other code asks the spec: which tensors a condition has and where ComfyUI keeps them, how
latents are scaled and cut into tokens, which module lists are blocks, what ComfyUI's detection would say.
docs/families.md goes through it step by step.
"""
