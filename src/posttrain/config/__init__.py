"""Configuration of stages and chains: every key known, every value checked. Imports no torch."""
