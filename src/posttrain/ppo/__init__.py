"""PPO on transformers' Trainer: `PPOTrainer(model, reward_funcs, args=PPOConfig(...), train_dataset=...)`."""

from .config import PPOConfig
from .trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
