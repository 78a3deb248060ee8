"""The embedded models and data of the demos, from PyPI packages and without a hub."""
