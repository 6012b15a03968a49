"""The panel of the sidebar: what it shows, what its buttons do, and its routes."""
