"""Text encoders in the ranks."""
