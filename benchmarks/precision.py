"""What number formats keep and lose, measured on this machine: the blocks of docs/precision.md.

    python benchmarks/precision.py              # all of them
    python benchmarks/precision.py formats      # or updates, training, gradients, scaler

All of it runs on a CPU. `gradients` reads the tagger's demo model (`make demo-ner` brings it).
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from posttrain.models.floats import BF16, FORMATS, FP16, FP32

STEPS, RATE, WEIGHT = 1000, 1e-3, 1.0  # of `updates`


def formats() -> list[str]:
    """Range and spacing."""
    rows = [("", "sign, exponent, mantissa", "largest", "smallest normal", "smallest", "spacing at 1", "at 1,000",
             "1 + x is 1 up to x =", "integers exact to")]  # fmt: skip
    for f in FORMATS:
        at_1000 = f.spacing_at(1000)
        rows.append(
            (f.name, f"1, {f.exponent_bits}, {f.mantissa_bits}", f"{f.largest:.5g}", f"{f.smallest_normal:.3g}",
             f"{f.smallest_subnormal:.3g}", f"{f.spacing_at(1):.3g}",
             "too large" if at_1000 != at_1000 else f"{at_1000:.3g}", f"{f.lost_beside_one:.3g}",
             f"{f.exact_integers:,}")
        )  # fmt: skip
    return aligned(rows)


def updates() -> list[str]:
    """A weight of 1 that should arrive at 0: 0.001 is subtracted a thousand times, rounded after each."""
    rows = [("weight kept in", f"after {STEPS:,} updates of {RATE:g}", "after the first")]
    for f in FORMATS:
        weight, first = WEIGHT, f.round(WEIGHT - f.round(RATE))
        for _ in range(STEPS):
            weight = f.round(weight - f.round(RATE))
        rows.append((f.name, f"{weight:.4f}", f"{first:.6f}"))
    master = WEIGHT
    for _ in range(STEPS):
        master = FP32.round(master - BF16.round(RATE))  # the gradient is computed in bf16
    first = BF16.round(FP32.round(WEIGHT - BF16.round(RATE)))
    rows.append(("bf16, with an fp32 master", f"{BF16.round(master):.4f}", f"{first:.6f}"))
    return aligned(rows)


def training() -> list[str]:
    """A small network is fine-tuned, 400 steps of AdamW at 1e-4, in three ways from the same weights; three seeds."""
    ways = ("bf16 weights", "fp32 weights, bf16 compute", "fp32")
    rows = [("", "loss before", "after", "updates lost", "weights that never moved")]
    for way in ways:
        runs = [fine_tune(way, seed) for seed in range(3)]
        before, after, lost, still = (sum(column) / len(runs) for column in zip(*runs, strict=True))
        rows.append((way, f"{before:.2g}", f"{after:.1g}", f"{lost:.0%}", f"{still:.0%}"))
    return aligned(rows)


def fine_tune(way: str, seed: int, *, steps: int = 400, rate: float = 1e-4) -> tuple[float, float, float, float]:
    """(loss before, loss after, share of updates that left a weight as it was, share of weights that never moved).

    The teacher is the student plus a small change, as fine-tuning means it. Losses are measured in fp32.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 32, generator=generator)
    shapes = ((32, 64), (64, 64), (64, 1))
    start = [torch.randn(s, generator=generator).mul(s[0] ** -0.5).bfloat16().float() for s in shapes]
    teacher = [w + 0.02 * torch.randn(w.shape, generator=generator) for w in start]

    def network(weights: Sequence[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        for w in weights[:-1]:
            inputs = torch.tanh(inputs @ w)
        return inputs @ weights[-1]

    def loss_of(weights: Sequence[torch.Tensor]) -> float:
        with torch.no_grad():
            return float((network([w.float() for w in weights], x) - y).square().mean())

    y = network(teacher, x)
    dtype = torch.bfloat16 if way == "bf16 weights" else torch.float32
    weights = [w.to(dtype, copy=True).requires_grad_() for w in start]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0)
    before, lost, total = loss_of(weights), 0, 0
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "fp32 weights, bf16 compute"):
            prediction = network(weights, x.to(dtype))
        (prediction.float() - y).square().mean().backward()
        old = [w.detach().clone() for w in weights]
        optimizer.step()
        lost += sum(int(((w == o) & (w.grad != 0)).sum()) for w, o in zip(weights, old, strict=True))
        total += sum(int((w.grad != 0).sum()) for w in weights)
        optimizer.zero_grad()
    moved = [(w.float() != s).float().mean() * w.numel() for w, s in zip(weights, start, strict=True)]
    return before, loss_of(weights), lost / total, 1 - float(sum(moved)) / sum(w.numel() for w in weights)


SCALES = (1, 2**4, 2**8, 2**12, 2**16, 2**20, 2**24)


def gradients() -> list[str]:
    """MiniLM's gradients in fp16 by the scale of the loss, after 40 steps on tagged sentences; shares of non-zeros."""
    import torch

    grads = tagger_gradients()
    exact = grads(None, 1)
    rows = [("loss times", "rounded to 0", "below the smallest normal", "infinite or NaN", "the step is")]
    for scale in SCALES:
        found = grads(torch.float16, scale)[exact != 0]
        broken = float((~found.isfinite()).float().mean())
        zero = float((found == 0).float().mean())
        subnormal = float(((found != 0) & (found.abs() < FP16.smallest_normal)).float().mean())
        lost = ("", "", f"{broken:.0%}", "skipped") if broken else (f"{zero:.1%}", f"{subnormal:.0%}", "0%", "taken")
        rows.append((f"{scale:,}", *lost))
    return aligned(rows)


def tagger_gradients() -> Callable[[Any, float], Any]:
    """(dtype of autocast or None, scale) -> the gradients of every weight, in one vector, as a loss scaler gets them.

    The weights are those after 40 steps of full fine-tuning in fp32, where the loss is small, and its gradients too.
    """
    import torch
    from transformers import DataCollatorForTokenClassification, set_seed

    from posttrain.config.sections import ModelSettings, NerDataSettings
    from posttrain.demo import spelling as demo
    from posttrain.demo.entities import DATA_DIR, MODEL_DIR
    from posttrain.models.loading import load_base, load_tokenizer
    from posttrain.ner.alignment import encode
    from posttrain.ner.reading import load_sentences

    demo.prepare(lambda line: None, ner=True)
    train = load_sentences(str(DATA_DIR / "train.conll"), NerDataSettings(), key="train_file")
    labels = train.tag_list()
    settings = ModelSettings(dtype="float32")
    tokenizer = load_tokenizer(str(MODEL_DIR), settings, task="TOKEN_CLS")
    encoded = encode([s.tokens for s in train.sentences], tokenizer, max_length=256, overlap=32)
    number = {label: i for i, label in enumerate(labels)}
    rows = encoded.to_dataset([[number[tag] for tag in s.tags] for s in train.sentences])
    collate = DataCollatorForTokenClassification(tokenizer)
    set_seed(0)
    model = load_base(str(MODEL_DIR), settings, task="TOKEN_CLS", labels=labels).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def grads(dtype: Any, scale: float, first: int = 0) -> Any:
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype or torch.float32, enabled=dtype is not None):
            loss = model(**collate([rows[i] for i in range(first, first + 16)])).loss
        (loss * scale).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    for step in range(40):
        grads(None, 1, first=16 * (step % (len(rows) // 16)))
        optimizer.step()
    return grads


def scaler() -> list[str]:
    """torch's dynamic loss scaling at work: halved where a gradient overflows, doubled after 20 good steps."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 1, generator=generator)
    weight = torch.zeros(8, 1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.05)
    scaling = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=20)
    rows = [("step", "scale", "what happened")]
    was = scaling.get_scale()
    for step in range(1, 61):
        with torch.autocast("cpu", dtype=torch.float16):
            prediction = x @ weight
        loss = (prediction.float() - y).square().mean()
        scaling.scale(loss).backward()
        scaling.step(optimizer)
        scaling.update()
        optimizer.zero_grad()
        now = scaling.get_scale()
        if now < was:
            rows.append((str(step), f"{was:,.0f}", f"a gradient was infinite: step skipped, scale {now:,.0f}"))
        elif now > was:
            rows.append((str(step), f"{was:,.0f}", f"20 steps without: scale {now:,.0f}"))
        was = now
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "formats": formats, "updates": updates, "training": training, "gradients": gradients, "scaler": scaler,
}  # fmt: skip


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("block", nargs="?", choices=BLOCKS)
    chosen = parser.parse_args(argv).block
    for name, block in BLOCKS.items():
        if chosen is None:
            print(f"\n{name}: {(block.__doc__ or '').splitlines()[0]}")
        if chosen in (None, name):
            print("\n".join(block()))


if __name__ == "__main__":
    main()
