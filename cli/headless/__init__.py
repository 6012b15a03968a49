"""Runs API-format workflows without ComfyUI: for servers, scripts and tests. ComfyUI is the pack's host."""
