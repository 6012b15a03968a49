"""Shared by the nodes' VALIDATE_INPUTS."""

from __future__ import annotations
