"""Private parts of transformers 5.23 that are used: of trainers and of models."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

# Trainers


def keep_column(trainer: "Trainer", name: str) -> None:
    """Have `trainer` keep a dataset column that is no argument of the model's `forward`.

    transformers drops such columns before anything reads them, even `length_column_name`; the public
    `remove_unused_columns=False` would keep all of them.
    """
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, name]


def replace_train_sampler(trainer: "Trainer", make: Callable[[Any], Any]) -> None:
    """Have `trainer` sample training rows by `make(sampler)`, where `sampler` is the one it would use otherwise.

    A subclass would override `_get_train_sampler`; for a trainer that exists already there is no public way.
    """
    own = trainer._get_train_sampler
    trainer._get_train_sampler = lambda dataset=None: make(own(dataset))


def add_to_checkpoints(trainer: "Trainer", write: Callable[[Path], None], read: Callable[[Path], None]) -> None:
    """Have `trainer` write more files wherever it saves weights, and resume from those instead of its own.

    `write(folder)` is called after transformers has written its files; `read(folder)` replaces transformers' reading.
    """
    save = trainer._save

    def save_more(output_dir: str | None = None, state_dict: Any = None) -> None:
        save(output_dir, state_dict)
        if output_dir is not None:
            write(Path(output_dir))

    def load(resume_from_checkpoint: str, model: "PreTrainedModel | None" = None) -> None:
        read(Path(resume_from_checkpoint))

    trainer._save, trainer._load_from_checkpoint = save_more, load


def forget_deepspeed() -> None:
    """Have transformers load complete weights on each process. Call it after the arguments and before a model is made.

    Otherwise accelerate 1.15 lets ZeRO-3 partition them while they are read, whatever `zero3_init_flag` says
    (`DeepSpeedPlugin.set_deepspeed_weakref`).
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


# Models


def commit_of(config: Any) -> str | None:
    """The commit on the hub that a model was loaded from; None for a local folder."""
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def blocks_of(model: "PreTrainedModel") -> list[str]:
    """Class names of the blocks that must not be split, as listed by the model's authors; empty if they list none."""
    return list(getattr(model, "_no_split_modules", None) or ())


def takes_dynamic_cache(model: "PreTrainedModel") -> bool:
    """Whether `generate` would give this model a `DynamicCache`."""
    return bool(model._supports_default_dynamic_cache())


def install_parallel_style(style: str, module: Any, devices: Any) -> None:
    """Shard a module's own parameters over a device mesh and replace its `forward`, by a style of a `tp_plan`.

    The public way, `from_pretrained(tp_plan=)`, shards while it loads, which is before an adapter is made.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    for name, _ in list(module.named_parameters(recurse=False, remove_duplicate=False)):
        ALL_PARALLEL_STYLES[style].shard_param(module, name, devices)
    ALL_PARALLEL_STYLES[style].install_forward(module, devices)
