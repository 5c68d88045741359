"""Versions of what decides a run's numbers, without importing any of it: the check of a job's nodes must be quick."""

import importlib.metadata


def library_versions() -> dict[str, str]:
    """Of samestep and of what decides its numbers."""
    names = ("samestep", "torch", "accelerate", "transformers", "peft", "deepspeed")
    return {name: importlib.metadata.version(name) for name in names}
