"""The embedded default: real models and data from PyPI packages, nothing from a hub."""
