"""From a recipe and its arguments to running processes: here, or on the nodes of a Slurm cluster.

accelerate.py    the only builder of `accelerate launch`
settings.py      what a chain says about its launch, checked
script.py        a stage as a batch script (job.sbatch.j2)
slurm.py         sbatch, scontrol and scancel
preflight.py     the nodes find each other before a model is loaded
stop.py          a run that is asked to stop saves a checkpoint, on all ranks at one step
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
