"""Gates: checks that a stage must pass before the next one may start. Each takes seconds and gives one `Gate`.

    stops         enough completions end by EOS
    reload        the saved files reproduce the trained model's outputs
    takeover      the policy that a stage starts from reproduces its parent's outputs
    step0         before DPO or PPO: policy and reference reproduce the input policy's outputs;
                  DPO's loss is ln 2 and its margins are 0
    accuracy      the reward model ranks enough held-out pairs right
    f1            the tagger finds enough entities
    eos           EOS is among the labels (before training)

The probe is one fixed row of token ids with the finished policy's log-probabilities of them. It is kept in the lineage,
and the next stage, in another process, must compute the same numbers.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import attach
from ..config.peft_methods import METHODS, method_of
from ..distributed.deepspeed import before_split
from ..errors import GateError
from ..models.precision import has_bf16

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

# Largest difference of log-probabilities, in nats, from summing in another order in that number format.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


@dataclass(frozen=True)
class Gate:
    """One passed or failed check: `value`, and in words what is `accepted`."""

    name: str
    passed: bool
    value: float
    accepted: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require(gates: Sequence[Gate], run_dir: Path) -> None:
    """Raise GateError with every failed gate and its value; the run directory is kept as it is."""
    failed = [g for g in gates if not g.passed]
    if failed:
        lines = "\n".join(f"  {g.name}: {g.value:.4g}, must be {g.accepted}. {g.advice}".rstrip() for g in failed)
        raise GateError(f"{run_dir} did not pass its gates; everything is kept there:\n{lines}")


def probe_logprobs(model: "PreTrainedModel", input_ids: Sequence[int], *, adapter: str | None = "") -> list[float]:
    """Log-probability of each token of `input_ids` after the first, in eval mode: (T - 1,) floats.

    `adapter` is the one to compute with: a name, None for no adapter, "" for the active one.
    """
    import torch

    from ..upstream.trl import use_adapter

    ids = torch.tensor([list(input_ids)], device=model.device)
    was_training = model.training
    model.eval()
    context = nullcontext() if adapter == "" else use_adapter(model, adapter)
    with torch.no_grad(), context:
        logits = model(input_ids=ids).logits[:, -ids.shape[1] :].float()  # without virtual tokens
    model.train(was_training)
    logprobs = torch.log_softmax(logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    values: list[float] = logprobs.tolist()
    return values


def dtype_of(model: "PreTrainedModel") -> str:
    """The number format that a model computes in, a key of TOLERANCE.

    On a CPU with bf16, bitsandbytes multiplies 4-bit weights in bf16 during inference, whatever the model's own format
    is. So two forward passes of one model may differ by bf16's tolerance.
    """
    if getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu" and has_bf16():
        return "bfloat16"
    return str(model.dtype).removeprefix("torch.")


def same_outputs(name: str, got: Sequence[float], expected: Sequence[float], *, dtype: str, advice: str = "") -> Gate:
    """Whether two lists of numbers agree within the tolerance of `dtype`."""
    if len(got) != len(expected):
        raise GateError(f"{name}: {len(got)} numbers against {len(expected)}; the probe row was cut")
    differences = [abs(a - b) for a, b in zip(got, expected, strict=True)]
    worst = math.nan if any(map(math.isnan, differences)) else max(differences, default=0.0)
    tolerance = TOLERANCE[dtype]
    return Gate(name, worst <= tolerance, worst, f"at most {tolerance:g} (largest difference of outputs)", advice)


def reloads(
    model: "PreTrainedModel",
    adapter_dir: Path,
    forward: Callable[[Any], list[float]],
    *,
    dtype: str,
    fresh: Callable[[], Any],
) -> Gate:
    """The saved adapter, read back, reproduces the outputs `forward(model)` of the trained one.

    It is read back beside the trained one or, for methods that allow no second adapter, onto `fresh()`, the model under
    the adapter loaded again.
    """
    advice = "The files are not what was trained: do not use them."
    trained = forward(model)
    if not METHODS[method_of(model.peft_config["default"])].continues:
        again = forward(attach(fresh(), adapter_dir, trainable=False))
        return same_outputs("reload", again, trained, dtype=dtype, advice=advice)
    active = model.active_adapter
    model.load_adapter(str(adapter_dir), "reloaded", is_trainable=False)
    model.set_adapter("reloaded")
    try:
        again = forward(model)
    finally:
        model.set_adapter(active)
        model.delete_adapter("reloaded")
    return same_outputs("reload", again, trained, dtype=dtype, advice=advice)


def stops(share: float, floor: float) -> Gate:
    return Gate(
        "stops", share >= floor, share, f"at least {floor:g} (share of completions that end by EOS)",
        "Train longer, raise max_new_tokens if completions are long, lower the learning rate of DPO or add an sft loss "
        "to it, or set gates.stops.",
    )  # fmt: skip


def accuracy(value: float, floor: float) -> Gate:
    return Gate(
        "accuracy", value >= floor, value, f"at least {floor:g} (held-out pairs ranked right)",
        "More or cleaner pairs, more steps; or lower gates.reward_accuracy, knowing what PPO will optimise.",
    )  # fmt: skip


def f1(value: float, floor: float) -> Gate:
    return Gate(
        "f1", value >= floor, value, f"at least {floor:g} (micro F1 of entities on the test sentences)",
        "More sentences or epochs, another learning rate or adapter; or lower gates.f1.",
    )  # fmt: skip


def dpo_step_zero(trainer: "Trainer", *, beta_loss: bool) -> list[Gate]:
    """Before the first step, on the first rows: the loss is ln 2 (sigmoid loss) and the reward margins are 0.

    Uses the trainer's own collator and loss; random states stay as they are, and no metric is left behind. In 16 bits
    two forward passes of one policy differ by rounding at each token, so a margin may be off by beta times the
    tolerance of a log-probability, times the square root of the number of tokens. A wrong reference is off by nats.
    """
    import torch
    from accelerate.utils import send_to_device

    from ..upstream.trl import recorded_metrics

    rows = [trainer.train_dataset[i] for i in range(min(4, len(trainer.train_dataset)))]
    inputs = send_to_device(trainer.data_collator(rows), trainer.args.device)
    was_training = trainer.model.training
    trainer.model.eval()
    with torch.no_grad(), before_split(), trainer.compute_loss_context_manager():
        loss = float(trainer.compute_loss(trainer.model, inputs))
    trainer.model.train(was_training)
    margin = 0.0
    for metrics in recorded_metrics(trainer).values():
        margin = max([margin, *(abs(v) for v in metrics.get("rewards/margins", []))])
        metrics.clear()
    dtype = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else dtype_of(trainer.model)
    summed = float(inputs["completion_mask"].sum(-1).max())
    tolerance = 1e-3 if dtype == "float32" else max(1e-3, trainer.args.beta * TOLERANCE[dtype] * math.sqrt(summed))
    advice = "The reference is not the policy that DPO starts from: check inputs.policy and adapter.start."
    gates = [Gate("step0 margin", margin <= tolerance, margin, f"0 (at most {tolerance:.2g})", advice)]
    if beta_loss:
        off = abs(loss - math.log(2))
        gates.append(Gate("step0 loss", off <= tolerance, loss, f"ln 2 = 0.6931 (within {tolerance:.2g})", advice))
    return gates


def eos_is_learned(trainer: "Trainer", tokenizer: "PreTrainedTokenizerBase") -> Gate:
    """EOS is among the labels of rows that were not truncated, even if it is also the pad token."""
    rows = [trainer.train_dataset[i] for i in range(min(16, len(trainer.train_dataset)))]
    labels = trainer.data_collator(rows)["labels"]
    eos = tokenizer.eos_token_id
    whole = [
        bool((row == eos).any())
        for row, source in zip(labels, rows, strict=False)
        if trainer.args.max_length is None or len(source["input_ids"]) < trainer.args.max_length
    ]
    share = sum(whole) / len(whole) if whole else 1.0
    return Gate(
        "eos", share == 1.0, share, "1 (share of untruncated rows with EOS among their labels)",
        f"The policy could never learn to stop: the chat template must end a turn with {tokenizer.eos_token!r}.",
    )  # fmt: skip
