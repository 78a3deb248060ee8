"""The language-model head on a CPU: only labelled positions, in one matrix of logits.

TRL's fused head is made for Triton. Without Triton it scores every position, prompt and padding included, in tiles that
the backward pass recomputes (trl 1.16, `trl/trainer/utils.py`, `add_fused_lm_head`; huggingface/trl#7244). Here the
labelled positions are gathered first, as TRL does on a GPU, and their logits are kept for the backward pass if they fit
into `BUDGET_BYTES`; otherwise TRL's tiles are used. `benchmarks/train.py --gains` measures it.
"""

from typing import Any

BUDGET_BYTES = 512 * 2**20


def use_dense_lm_head() -> bool:
    """Make TRL's trainers use this head if there is no Triton device. Returns whether it did; safe to call again."""
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return False
    from ...upstream.trl import replace_logprob_function

    replace_logprob_function(_DenseLogProb)
    return True


class _DenseLogProb:
    """Replaces TRL's autograd function: the same `apply`, the same five results."""

    def __init__(self, tiled: Any) -> None:
        self.tiled = tiled

    def apply(
        self,
        hidden: Any,
        weight: Any,
        bias: Any,
        targets: Any,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Any, Any, Any, Any, Any]:
        if hidden.shape[0] * weight.shape[0] * 4 > BUDGET_BYTES:
            result: tuple[Any, Any, Any, Any, Any] = self.tiled.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
            return result
        return logprobs(
            hidden, weight, bias, targets, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            outputs=outputs,
        )  # fmt: skip


def logprobs(
    hidden: Any,
    weight: Any,
    bias: Any,
    targets: Any,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> tuple[Any, Any, Any, Any, Any]:
    """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of `targets`, each (N,), from `hidden` (N, H).

    Those that are not in `outputs` are None. Only log_probs carries a gradient: trainers only log the others.
    """
    import torch
    import torch.nn.functional as F

    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)).float()
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature != 1.0:
        logits = logits / temperature
    log_p = logits.log_softmax(-1)
    log_probs = log_p.gather(1, targets[:, None])[:, 0]
    extras: dict[str, Any] = {}
    with torch.no_grad():
        if "entropy" in outputs or "log_sum_sq_probs" in outputs:
            probabilities = log_p.exp()
            if "entropy" in outputs:
                extras["entropy"] = -torch.einsum("nv,nv->n", probabilities, log_p)
            if "log_sum_sq_probs" in outputs:
                extras["log_sum_sq_probs"] = torch.einsum("nv,nv->n", probabilities, probabilities).log()
        if "mean_logits" in outputs:
            extras["mean_logits"] = logits.mean(-1)
        if "is_top1" in outputs:
            extras["is_top1"] = logits.argmax(-1) == targets
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    entropy, log_sum_sq_probs, mean_logits, is_top1 = (extras[n] if n in outputs else None for n in names)
    return log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1
