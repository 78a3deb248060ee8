"""Chains of stages: the graph, the plan, running here or as Slurm jobs."""
