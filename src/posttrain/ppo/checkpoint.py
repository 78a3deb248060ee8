"""What a PPO checkpoint holds beside transformers' own files, so that a resumed run equals an uninterrupted one.

actor_critic.safetensors    the trained tensors of policy and critic; DeepSpeed keeps them beside its optimizer
rollout-<rank>.safetensors  each process's rollout, if the checkpoint is in the middle of one
ppo_state.json              the micro-batches done; the KL controller, the scores' moments, the health watch
healthy.safetensors         the weights that `on_unhealthy: rollback` returns to
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError
from .rollout import Rollout

if TYPE_CHECKING:
    from transformers import Trainer

WEIGHTS, STATE, HEALTHY = "actor_critic.safetensors", "ppo_state.json", "healthy.safetensors"
ROLLOUT = "rollout-{rank}.safetensors"


def save(trainer: "Trainer", folder: Path) -> None:
    """Write these files, and wait until every process has written its rollout."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if trainer.rollout is not None and trainer.within_rollout:
        file = folder / ROLLOUT.format(rank=trainer.args.process_index)
        save_file({name: tensor.cpu() for name, tensor in trainer.rollout.state().items()}, file)
    if trainer.args.should_save:
        if not trainer.is_deepspeed_enabled:
            trained = trainer.accelerator.unwrap_model(trainer.model).trainable()
            save_file({name: p.detach().contiguous().cpu() for name, p in trained.items()}, folder / WEIGHTS)
        state = {
            "step": trainer._step, "abandoned": trainer.abandoned, "world_size": trainer.args.world_size,
            "collector": trainer.collector.state_dict(), "health": trainer.health.state_dict(),
        }  # fmt: skip
        if trainer.health.healthy:
            healthy = trainer.health.healthy.items()
            save_file({name: tensor.cpu().contiguous() for name, tensor in healthy}, folder / HEALTHY)
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def load_weights(trainer: "Trainer", folder: Path) -> None:
    """Read the trained tensors back. Raises ValueError when their names are not those of this trainer's."""
    from safetensors.torch import load_file

    saved, mine = load_file(folder / WEIGHTS), trainer.accelerator.unwrap_model(trainer.model).trainable()
    if saved.keys() != mine.keys():
        raise ValueError(f"{folder / WEIGHTS} holds other parameters: {sorted(saved.keys() ^ mine.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(saved[name])


def load_state(trainer: "Trainer", folder: Path) -> None:
    """Read the rest back. Raises ConfigError when another number of processes wrote it."""
    from safetensors.torch import load_file

    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["world_size"] != trainer.args.world_size:
        raise ConfigError(
            f"{folder} was written by {state['world_size']} processes, this run has {trainer.args.world_size}; a "
            f"rollout that has begun cannot be redistributed: resume with {state['world_size']}"
        )
    trainer._step, trainer.abandoned = state["step"], state["abandoned"]
    trainer.collector.load_state_dict(state["collector"])
    trainer.health.load_state_dict(state["health"])
    device = trainer.accelerator.device
    if (folder / HEALTHY).is_file():
        trainer.health.healthy = {name: t.to(device) for name, t in load_file(folder / HEALTHY).items()}
    if trainer.within_rollout:
        tensors = load_file(folder / ROLLOUT.format(rank=trainer.args.process_index))
        trainer.rollout = Rollout(**{name: tensor.to(device) for name, tensor in tensors.items()})
