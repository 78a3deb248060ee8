"""What a stage must prove before the next one may build on it. Each check takes seconds and yields one `Gate`.

    stops         the policy ends its completions by itself
    reload        the saved files give the outputs that the trained model gave
    takeover      a policy that starts from a stage is that stage's policy
    reference     so is DPO's reference
    step0         DPO's first loss is ln 2 and its margins are 0
    accuracy      the reward model ranks held-out pairs
    eos           EOS is a learned label (before training)

The probe is one fixed row of token ids with the log-probabilities that the finished policy gives them, kept in the
lineage: the next stage, another process, must find the same numbers.
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

# Log-probabilities may differ by what another order of additions costs, in fp32 and in 16-bit arithmetic.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


@dataclass(frozen=True)
class Gate:
    """One proven or failed promise: `value` against `accepted`, in words that stand alone."""

    name: str
    passed: bool
    value: float
    accepted: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require(gates: Sequence[Gate], run_dir: Path) -> None:
    """Raise GateError naming every number that was wrong; the run directory is kept as it is."""
    failed = [g for g in gates if not g.passed]
    if failed:
        lines = "\n".join(f"  {g.name}: {g.value:.4g}, must be {g.accepted}. {g.advice}".rstrip() for g in failed)
        raise GateError(f"{run_dir} did not pass its gates; everything is kept there:\n{lines}")


def probe_logprobs(model: "PreTrainedModel", input_ids: Sequence[int], *, adapter: str | None = "") -> list[float]:
    """Log-probability of each token of `input_ids` after the first, in eval mode: (T - 1,) floats.

    `adapter` switches first: a name, or None for "adapters off"; "" leaves the active one.
    """
    import torch

    from ..upstream.trl import use_adapter

    ids = torch.tensor([list(input_ids)], device=model.device)
    was_training = model.training
    model.eval()
    context = nullcontext() if adapter == "" else use_adapter(model, adapter)
    with torch.no_grad(), context:
        logits = model(input_ids=ids).logits[:, -ids.shape[1] :].float()  # behind virtual tokens
    model.train(was_training)
    logprobs = torch.log_softmax(logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    values: list[float] = logprobs.tolist()
    return values


def dtype_of(model: "PreTrainedModel") -> str:
    """The number format that a model computes in, a key of TOLERANCE.

    On a CPU with bf16, bitsandbytes multiplies 4-bit weights in bf16 whatever the model's own format is, and does so in
    inference only: two forwards of one model differ by that much.
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
    """The saved adapter, read back, gives the outputs of the trained one. `forward(model)` gives the outputs.

    It is read back beside the trained one; or onto `fresh()`, what the adapter sits on, loaded again, where a second
    adapter cannot stand beside the first.
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
    """Before the first step: loss is ln 2 (sigmoid loss) and the reward margins are 0, on the first rows.

    Uses the trainer's own collator and loss; no random state is touched and no metric is left behind. In 16 bits two
    forwards of one policy differ by rounding, token by token: a margin may be off by beta times the tolerance of a
    log-probability, times the root of the tokens that are summed. A wrong reference is off by nats.
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
    """EOS is among the labels of the rows that were not cut, also when it is the pad token as well."""
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
        "eos", share == 1.0, share, "1 (share of whole rows whose labels hold EOS)",
        f"The policy could never learn to stop: the chat template must end a turn with {tokenizer.eos_token!r}.",
    )  # fmt: skip
