"""Starts the processes of a recipe: on this machine, or on the nodes of a Slurm cluster.

accelerate.py    the only builder of `accelerate launch`
settings.py      the keys of a chain's `launch`, checked
script.py        the batch script of a stage (job.sbatch.j2)
slurm.py         sbatch, scontrol and scancel
preflight.py     checks that the nodes reach each other before a model is loaded
stop.py          a run that is asked to stop saves a checkpoint, on all ranks after the same step
"""

from .accelerate import (
    IN_CHAIN,
    ROOT,
    accelerate_config,
    accelerate_environment,
    build_command,
    check_config,
    die_with_chain,
    die_with_parent,
    environment,
    recipe_path,
)

__all__ = [
    "IN_CHAIN",
    "ROOT",
    "accelerate_config",
    "accelerate_environment",
    "build_command",
    "check_config",
    "die_with_chain",
    "die_with_parent",
    "environment",
    "recipe_path",
]
