"""One running stage. Every recipe takes these steps:

stage = open_stage("sft")        check configuration and inputs, take the run directory: all that is cheap to check
stage.announce(trainer)          print global batch, steps and tokens before training starts
stage.train(trainer)             train, from the last complete checkpoint if there is one
stage.save(trainer, tokenizer)   save into a sibling folder, then rename it
stage.close(...)                 check the gates, write the model card and last lineage.json: the stage is complete
"""

import importlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..adapters import count_parameters
from ..adapters.adalora import penalise
from ..adapters.checkpoint import keep_all_that_is_trained
from ..config.peft_methods import METHODS
from ..config.recipes import RECIPES
from ..config.sections import DataSettings, TrackingSettings, ValidationSettings
from ..config.stage_config import StageConfig, parse_args, trainer_class
from ..data.rows import Rows, load_hub, load_rows
from ..data.tokens import add_length_column
from ..distributed import checks, fsdp, rendezvous, strategy
from ..distributed.checkpoints import check_room
from ..errors import DataError
from ..fileio import write_atomically
from ..launch import die_with_chain, preflight
from ..log import is_main, log_line, world_size
from ..models.loading import template_sha256, tokenizer_sha256
from ..models.precision import decide, describe_weights, take_off_autocast
from ..redact import redact_values
from ..runs.card import write_card
from ..runs.directory import take_directory
from ..runs.key import stage_key
from ..runs.lineage import Lineage, git_commit, hash_files, parent_record, verify, versions, write_lineage
from ..runs.paths import ADAPTER, CARD, CHECKPOINTS, CONFIG, DATA, GATES, MODEL
from ..tracking.identity import identify
from ..tracking.performance import StepClock
from ..tracking.run_config import answers_of, describe_run, final_numbers
from ..tracking.select import choose
from ..tracking.tracker import Tracker
from ..tracking.trainers import describe_batches, trained_model
from . import gates as gate_checks
from .callbacks import callbacks_of
from .gates import Gate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

LOCK_S = 100  # a requeued job may have to wait until a process of its last try has ended; preflight waits for longer


class Stage:
    """A stage's configuration, its verified inputs and its run directory."""

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.launch = strategy.read_launch(config.recipe, config.values)
        self.run_dir = config.output_dir
        self.inputs = {role: Path(path) for role, path in config.inputs.items()}
        self.parents = {role: verify(path) for role, path in self.inputs.items()}
        self.key = stage_key(config, {role: parent.key for role, parent in self.parents.items()})
        self.started = time.monotonic()
        self.data: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.logged: frozenset[str] = frozenset()  # names of metrics that the trainer logged
        self.gates: list[Gate] = []
        self.parameters: tuple[int, int] | None = None  # (trained, all), once there is a trainer
        self.lock: IO[str] | None = None
        self.checkpoint: Path | None = None  # the one to resume from, once the processes have met
        self.tracker: Tracker | None = None  # in the first process, once the run directory is taken

    @property
    def policy(self) -> Lineage | None:
        return self.parents.get("policy")

    # Data

    def load(self, key: str) -> Rows | None:
        """The checked rows of `train_file`, `validation_file` or `test_file`; None when the key is not set.

        An input `data` (a sampling stage's pairs) replaces train_file and validation_file where these are not set.
        """
        settings = self.config.part(DataSettings)
        source = self.config.values.get(key)
        recipe = "evaluate" if key == "test_file" else self.config.recipe
        if source is None and "data" in self.inputs and key != "test_file":
            path = self.inputs["data"] / DATA / f"{key.removesuffix('_file')}.jsonl"
            source = str(path) if path.is_file() else None
        if source is not None:
            rows = load_rows(source, recipe, settings, key=key, seed=int(self.config.values.get("seed", 42)))
        elif settings.dataset_name and key == "train_file":
            rows = load_hub(settings, recipe, split=settings.dataset_train_split)
        elif (
            settings.dataset_name
            and key == "validation_file"
            and (split := self.config.part(ValidationSettings).dataset_test_split)
        ):
            rows = load_hub(settings, recipe, split=split)
        else:
            return None
        name = key.removesuffix("_file")
        self.data[name] = {"rows": len(rows), "format": rows.format, "fingerprint": rows.fingerprint}
        log_line(f"{name}: {len(rows)} rows, {rows.format}" + (f", {rows.skipped} skipped" if rows.skipped else ""))
        return rows

    def load_train(self) -> Rows:
        rows = self.load("train_file")
        if rows is None:
            raise DataError("no training data: set train_file, dataset_name, or inputs.data")
        return rows

    # Trainer

    def trainer_args(self, **changes: Any) -> Any:
        """TRL's configuration object for this recipe, with precision decided and checkpoints in the run directory.

        Before any weights are read, the processes of a launch meet here and compare what they are about to do. Raises
        LaunchError. `changes` are values that follow from the data; the stage's configuration is not changed.
        """
        values = decide({**self.config.trainer_values(), **changes})
        values["output_dir"] = str(self.run_dir / CHECKPOINTS)
        values["report_to"] = "none"  # tracking/ reports instead of transformers' callbacks
        values.pop("project", None)
        timeout_s = float(values.get("ddp_timeout") or 1800)
        self.meet(timeout_s)
        rendezvous.start_process_group(timeout_s, on_cpu=values["use_cpu"])
        module, name = trainer_class(self.config.recipe)
        args = getattr(importlib.import_module(module), name)(**values)
        strategy.prepare(args, self.launch)
        return args

    def meet(self, timeout_s: float = rendezvous.MEETING_S) -> None:
        """Check that all processes have the same configuration, data, seed and run directory; find the checkpoint.

        Raises LaunchError on all of them otherwise.
        """
        facts = {
            "seed": self.config.values.get("seed"),
            "data": {name: data["fingerprint"] for name, data in self.data.items()},
            "versions": versions(),
            "key": self.key,
        }
        self.checkpoint = rendezvous.join(
            self.run_dir, self.run_dir / CHECKPOINTS, self.launch, facts, timeout_s=timeout_s
        )

    def announce(self, trainer: "Trainer") -> None:
        """Print batch, steps and trained parameters; raise LaunchError if the launch or the disk does not fit them."""
        args = trainer.args
        checks.check_trainer(trainer, self.launch)
        checks.check_deepspeed_bf16(trainer, gate_checks.dtype_of(trained_model(trainer)))
        trained, total = self.parameters = count_parameters(trainer.model)
        log_line(
            f"{describe_batches(trainer)}; {METHODS[self.config.adapter.method].title}: {trained:,} of {total:,} "
            f"parameters trained ({trained / total:.2%}); {'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'}; "
            f"{self.launch}"
        )
        if not trainer.is_deepspeed_enabled and (note := describe_weights(trainer.model)):
            log_line(f"note: {note}")
        check_room(trainer, self.run_dir, trained)

    def train(self, trainer: "Trainer") -> None:
        """Train to the end, resuming from the last complete checkpoint if an earlier try was interrupted.

        Raises StoppedError, with a checkpoint saved, when the run was asked to stop.
        """
        from transformers import PrinterCallback

        from ..distributed.sampler import seed_length_sampler
        from ..upstream.accelerate import reach_samplers_behind_skips

        if trainer.args.train_sampling_strategy == "group_by_length":
            add_length_column(trainer)
            seed_length_sampler(trainer)
        reach_samplers_behind_skips()
        step = 0
        if self.checkpoint is not None:
            step = int(self.checkpoint.name.rpartition("-")[2])
            log_line(f"resuming from {self.checkpoint}")
        keep_all_that_is_trained(trainer)
        if self.launch.strategy == "fsdp2":
            fsdp.choose_units(trainer)
        if self.config.adapter.method == "adalora":
            penalise(trainer)
        clock = StepClock(
            trainer, pairs=RECIPES[self.config.recipe].pairs
        )  # after penalise: the penalty is part of the loss
        callbacks = callbacks_of(self, trainer, clock)
        if self.tracker is not None:
            self.tracker.start(describe_run(self, clock.describe()), step)
        trainer.remove_callback(PrinterCallback)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        strategy.gather_trained(trainer)
        take_off_autocast(trainer.accelerator.unwrap_model(trainer.model))

    def last_logs(self, trainer: "Trainer") -> dict[str, Any]:
        """The last logged value of each metric."""
        logs: dict[str, Any] = {}
        for record in trainer.state.log_history:
            logs |= {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("epoch", "step")}
        self.logged = frozenset(logs)
        return logs

    def save(self, trainer: "Trainer", tokenizer: "PreTrainedTokenizerBase") -> str:
        """Save the adapter (or full model) and its tokenizer, completely or not at all; return the folder's name."""
        from peft import PeftModel

        model = trained_model(trainer)
        is_adapter = isinstance(model, PeftModel)
        result = ADAPTER if is_adapter else MODEL
        partial = self.run_dir / f".{result}.partial"
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
            options = {"selected_adapters": ["default"], "save_embedding_layers": False} if is_adapter else {}
            model.save_pretrained(str(partial), **options)
            tokenizer.save_pretrained(str(partial))
            (partial / CARD).unlink(missing_ok=True)  # PEFT's is an empty form; `close` writes one
            shutil.rmtree(self.run_dir / result, ignore_errors=True)
            partial.replace(self.run_dir / result)
        trainer.accelerator.wait_for_everyone()
        return result

    # End

    def close(
        self,
        *,
        kind: str,
        result: str,
        task: str | None = None,
        start: str | None = None,
        base: Mapping[str, Any] | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> None:
        """Check the gates, then write the lineage, which makes the stage complete, and delete its checkpoints."""
        import torch

        if not is_main():
            return
        write_atomically(self.run_dir / GATES, json.dumps([g.to_dict() for g in self.gates], indent=2) + "\n")
        gate_checks.require(self.gates, self.run_dir)
        cost: dict[str, Any] = {
            "wall_s": round(time.monotonic() - self.started, 1),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if torch.cuda.is_available():
            cost |= {"device": torch.cuda.get_device_name(), "peak_gpu_bytes": torch.cuda.max_memory_allocated()}
        if self.parameters is not None:
            cost["trained_parameters"], cost["parameters"] = self.parameters
        lineage = Lineage(
            stage=self.run_dir.name,
            recipe=self.config.recipe,
            kind=kind,
            key=self.key,
            config=redact_values(self.config.to_dict()),
            task=task,
            start=start,
            parents={role: parent_record(self.run_dir, path) for role, path in self.inputs.items()},
            base=dict(base or {}),
            chat_template_sha256=template_sha256(tokenizer) if tokenizer else None,
            tokenizer_sha256=tokenizer_sha256(tokenizer) if tokenizer else None,
            data=self.data,
            versions=versions(),
            git_commit=git_commit(),
            seed=self.config.values.get("seed"),
            world_size=world_size(),
            metrics=self.metrics,
            gates=[g.to_dict() for g in self.gates],
            cost=cost,
        )
        lineage.files = hash_files(self.run_dir, result)
        if kind in (ADAPTER, MODEL):
            write_card(self.run_dir / result, lineage)
        write_lineage(self.run_dir, lineage)
        shutil.rmtree(self.run_dir / CHECKPOINTS, ignore_errors=True)
        if self.tracker is not None:
            self.tracker.start(describe_run(self), 0)  # for stages that do not train
            self.tracker.finish(
                lineage, final=final_numbers(self.metrics, self.logged), answers=answers_of(self.run_dir)
            )
        for gate in self.gates:
            log_line(f"gate {gate.name}: {gate.value:.4g} ({gate.accepted})")
        log_line(f"complete: {self.run_dir / result}")


def open_stage(recipe: str, argv: Sequence[str] | None = None) -> Stage:
    """Parse the command line, verify the inputs and take the run directory. Raises a PosttrainError.

    A directory that is complete or belongs to a run with another key is refused: nothing is overwritten.
    """
    die_with_chain()
    stage = Stage(parse_args(recipe, sys.argv[1:] if argv is None else argv))
    if is_main():
        settings = stage.config.part(TrackingSettings)
        choice = choose(settings)
        wait_s = LOCK_S if preflight.num_nodes() > 1 else 0
        stage.lock = take_directory(stage.run_dir, stage.key, recipe, wait_s=wait_s)
        stage.config.write(stage.run_dir / CONFIG)
        stage.tracker = Tracker(identify(stage.run_dir, stage.key, recipe), choice, settings)
    if preflight.num_nodes() > 1:
        nodes, took = preflight.num_nodes(), preflight.all_reduce()
        log_line(f"preflight: all-reduce over {world_size()} ranks on {nodes} nodes in {took:.2f} s")
    log_line(f"{recipe}: {stage.config.source} -> {stage.run_dir}  key {stage.key[:12]}")
    for note in stage.config.notes:
        log_line(f"note: {note}")
    if stage.tracker is not None:
        log_line(str(stage.tracker.choice))
    log_line("effective configuration: " + json.dumps(redact_values(_given(stage.config)), default=str))
    return stage


def _given(config: StageConfig) -> dict[str, Any]:
    """The values that are set, for one printed line; config.yaml has all of them."""
    return {k: v for k, v in config.to_dict().items() if v not in (None, {}, [])}
