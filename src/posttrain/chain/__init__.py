"""Chains of stages: read, planned, and run here or as Slurm jobs."""
