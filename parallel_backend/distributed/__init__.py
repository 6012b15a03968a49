"""Process groups, the axes of the mesh, and what passes over them."""
