"""The order of an epoch's rows under `train_sampling_strategy: group_by_length`, the same after a resume.

transformers draws it from torch's global generator when an epoch begins, and after a resume in the middle of one draws
another: some rows would be seen twice and others never. So the generator's state at the start of each epoch is kept
beside the checkpoints, and drawn from again. An undisturbed run is not changed. Several
processes have parallel/order.py.
"""

from pathlib import Path
from typing import Any

from .artifacts import write_atomically


def keep_order(trainer: Any, folder: Path) -> None:
    """Have the trainer's length-grouped sampler repeat, after a resume, the order that `folder` remembers."""
    import torch
    from torch.utils.data import Sampler

    make_sampler = trainer._get_train_sampler

    class RepeatableSampler(Sampler[int]):
        def __init__(self, sampler: Any) -> None:
            self.sampler = sampler

        def __len__(self) -> int:
            return len(self.sampler)

        def __iter__(self) -> Any:
            epoch = trainer.state.epoch or 0.0
            path = folder / f"order-{int(epoch)}.txt"
            if epoch != int(epoch):  # resumed in its middle; what was drawn since is restored when the place is found
                state = torch.frombuffer(bytearray.fromhex(path.read_text()), dtype=torch.uint8)
                self.sampler.generator = torch.Generator().set_state(state)
            elif trainer.is_world_process_zero():
                folder.mkdir(exist_ok=True)
                write_atomically(path, torch.get_rng_state().numpy().tobytes().hex())
            indices = iter(self.sampler)
            self.sampler.generator = None
            return indices

    trainer._get_train_sampler = lambda dataset=None: RepeatableSampler(make_sampler(dataset))
