"""Samplers as generators in sigma space, schedules, noise, and the serial driver."""
