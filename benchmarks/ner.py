"""The tagger on 14,000 sentences: the time to prepare them, and where the time of a training step goes.

    python benchmarks/ner.py                       # --sentences 14000 --steps 30 --file train.conll

Preparation is reading the file, converting the tags to BIO, and tokenizing the words. A step of the recipe's trainer is
compared with a bare loop of forward, backward and optimizer on the same batches, in turn, and with its data loader
alone: the trainer's time beyond the bare loop is Python overhead.
"""

import argparse
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

from posttrain.demo import spelling as demo

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=14_000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--file", type=Path, help="a file of your own in place of the demo's synthetic sentences")
    arguments = parser.parse_args()
    demo.prepare(ner=True)

    import torch
    from peft import get_peft_model
    from transformers import TrainingArguments

    from posttrain.adapters import peft_config
    from posttrain.config.sections import AdapterSettings, ModelSettings, NerDataSettings
    from posttrain.demo.entities import MODEL_DIR, make_sentences
    from posttrain.models.cpu.lora import use_accumulated_lora
    from posttrain.models.loading import load_base, load_tokenizer
    from posttrain.ner.alignment import encode
    from posttrain.ner.reading import load_sentences
    from posttrain.training import ner

    with tempfile.TemporaryDirectory() as folder:
        file = arguments.file or Path(folder) / "train.conll"
        if arguments.file is None:
            made = make_sentences({"train": arguments.sentences})["train"]
            file.write_text("\n".join("".join(f"{w} {t}\n" for w, t in s) for s in made), encoding="utf-8")
        tokenizer = load_tokenizer(str(MODEL_DIR), ModelSettings(), task="TOKEN_CLS")
        start = time.perf_counter()
        train = load_sentences(str(file), NerDataSettings(), key="train_file")
        read = time.perf_counter()
        encoded = encode([s.tokens for s in train.sentences], tokenizer, max_length=256, overlap=32)
        cut = time.perf_counter()
        labels = train.tag_list()
        ner.to_dataset(encoded, train, labels)
        done = time.perf_counter()
    print(f"{len(train)} sentences: read {read - start:.1f} s, tokens {cut - read:.1f} s, dataset {done - cut:.1f} s")

    use_accumulated_lora()
    torch.manual_seed(0)
    base = load_base(str(MODEL_DIR), ModelSettings(), task="TOKEN_CLS", labels=labels)
    model = get_peft_model(base, peft_config(AdapterSettings(), task="TOKEN_CLS", base=str(MODEL_DIR)))
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_steps=arguments.steps, use_cpu=True,
        bf16=False, report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no",
        label_names=["labels"], train_sampling_strategy="group_by_length", seed=0,
    )  # fmt: skip
    times: dict[str, list[float]] = {"trainer": [], "bare loop": [], "data loader": []}
    for _ in range(arguments.rounds):
        trainer = ner.make_trainer(
            model, args, tokenizer, {"train": encoded}, {"train": train, "validation": None}, labels
        )
        begun = time.perf_counter()
        batches = list(islice(trainer.get_train_dataloader(), arguments.steps))
        times["data loader"].append((time.perf_counter() - begun) / arguments.steps)
        begun = time.perf_counter()
        trainer.train()
        times["trainer"].append((time.perf_counter() - begun) / arguments.steps)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model.train()
        begun = time.perf_counter()
        for batch in batches:
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        times["bare loop"].append((time.perf_counter() - begun) / arguments.steps)
    step = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in step.items():
        print(f"{name:<12} {1000 * seconds:7.1f} ms per step  {seconds / step['trainer']:6.1%}")


if __name__ == "__main__":
    main()
