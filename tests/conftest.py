"""A tiny Llama with a chat template whose pad token is its EOS, like SmolLM2's: what every test trains on."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "POSTTRAIN_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equality in fp32 is what most tests are about; tests/gpu is for the rest
os.environ.setdefault("POSTTRAIN_REPORT_TO", "none")  # tests/tracking says what it reports to

import json
import string
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import forked

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable  # a new interpreter, also where `forked_processes` is in use


def pytest_configure(config):
    forked.open_session()


def pytest_unconfigure(config):
    forked.close_session()


@pytest.fixture(scope="module")
def forked_processes():
    """What the tests of a module start by `sys.executable`, and what posttrain starts for them, is forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forked.python())
        yield


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "receive",
    "believe",
    "achieve",
    "friend",
    "their",
    "weird",
    "separate",
    "definite",
    "tomorrow",
    "because",
    "until",
    "really",
]


def make_tiny_model(folder: Path, *, seed: int = 0, hidden: int = 32) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [f"{w} -> {w}" for w in WORDS],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    _teach(model, tokenizer)
    model.save_pretrained(folder)
    return folder


def _teach(model, tokenizer, steps=60):
    """Enough of the task that completions stop and are sometimes right: frozen noise would teach an adapter nothing."""
    import torch

    ids = [tokenizer(f"{w[1:]} -> {w}")["input_ids"] + [tokenizer.eos_token_id] for w in WORDS]
    width = max(map(len, ids))
    batch = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def tagged(text: str) -> list[tuple[str, str]]:
    """`Ada/B-PER met/O` as words with their tags."""
    return [tuple(word.rsplit("/", 1)) for word in text.split()]


SENTENCES = [
    tagged("Ada/B-PER Lovelace/I-PER met/O Acme/B-ORG in/O Rome/B-LOC ./O"),
    tagged("Rome/B-LOC is/O far/O from/O Oslo/B-LOC ./O"),
    tagged("Acme/B-ORG Works/I-ORG hired/O Alan/B-PER Turing/I-PER ./O"),
    tagged("Alan/B-PER was/O born/O in/O Oslo/B-LOC ./O"),
    tagged("It/O rained/O all/O day/O ./O"),
    tagged("Ada/B-PER left/O Rome/B-LOC for/O Acme/B-ORG ./O"),
]


def make_tiny_bert(folder: Path, *, seed: int = 0) -> Path:
    """A BERT of 32 features whose WordPiece cuts most words, and knows every character, Chinese too."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=False)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = [" ".join(word for word, _ in sentence) for sentence in SENTENCES]
    alphabet = [*string.ascii_letters, *string.digits, *".,'#", *"王小明在北京大学读书李雷去上海"]
    raw.train_from_iterator(
        words, trainers.WordPieceTrainer(vocab_size=140, special_tokens=special, initial_alphabet=alphabet,
                                         show_progress=False),
    )  # fmt: skip
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    return make_tiny_bert(tmp_path_factory.mktemp("bert"))


def write_conll(path: Path, sentences=SENTENCES, separator=" ") -> Path:
    path.write_text("\n".join("".join(f"{w}{separator}{t}\n" for w, t in s) for s in sentences), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Each word without its first letter, and the word: prompt-completion rows for a whole module."""
    rows = [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture
def pairs(tmp_path):
    """Prompt-completion rows."""
    rows = [{"prompt": f"{w[1:]}{w[0]} ->", "completion": f" {w}"} for w in WORDS]
    return write_jsonl(tmp_path / "train.jsonl", rows)


@pytest.fixture
def preferences(tmp_path):
    rows = [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS]
    return write_jsonl(tmp_path / "preferences.jsonl", rows)


def run_recipe(recipe: str, *args, expect: int | None = 0, env=None, fresh: bool = False):
    """Run a recipe in a process of its own; return it when it has finished.

    `fresh` starts a new interpreter, as a user does: for what is about imports and the first second.
    """
    python = PYTHON if fresh else forked.python()
    command = [python, str(ROOT / "recipes" / f"{recipe}.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})})
    if expect is not None:
        assert done.returncode == expect, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def run_here(recipe: str, *args):
    """Run a recipe in this process: the same code without ten seconds of imports. Raises its PosttrainError."""
    import runpy

    from posttrain import errors

    def leave(error):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [recipe, *map(str, args)])
        patch.setattr(errors, "_leave", leave)
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")


CHAIN_SETTINGS = """
per_device_train_batch_size: 4
learning_rate: 0.01
gradient_checkpointing: false
logging_steps: 1
save_steps: 1
max_steps: 4
adapter: {r: 4, alpha: 8}
"""
POLICY_SETTINGS = f"{CHAIN_SETTINGS}gates: {{stops: 0}}\nmax_new_tokens: 4\n"


@pytest.fixture
def chain(tiny, tmp_path):
    """SFT, then a reward model and DPO from it."""
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS])
    write_jsonl(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS],
    )
    (tmp_path / "sft.yaml").write_text(
        f"model_name_or_path: {tiny}\ntrain_file: {tmp_path}/train.jsonl\n{POLICY_SETTINGS}"
    )
    (tmp_path / "dpo.yaml").write_text(f"train_file: {tmp_path}/pairs.jsonl\nbeta: 0.1\n{POLICY_SETTINGS}")
    (tmp_path / "reward.yaml").write_text(f"train_file: {tmp_path}/pairs.jsonl\n{CHAIN_SETTINGS}")
    (tmp_path / "chain.yaml").write_text(
        f"""name: tiny
output_dir: {tmp_path}/runs
stages:
  dpo:    {{recipe: dpo, config: dpo.yaml, inputs: {{policy: sft}}}}
  sft:    {{recipe: sft, config: sft.yaml}}
  reward: {{recipe: reward, config: reward.yaml, inputs: {{policy: sft}}}}
launch: {{accelerate_config: cpu.yaml}}
"""
    )
    return tmp_path / "chain.yaml"


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def actions(chain):
    from posttrain.chain.graph import read_chain
    from posttrain.chain.plan import plan

    return {p.stage.name: p.action for p in plan(read_chain(chain))}


@contextmanager
def small_disk(folder: Path):
    """A function that makes `folder` a disk of a size, or gives the disk that it is another size. Needs root."""
    folder.mkdir()

    def resize(size: str) -> Path:
        option = "remount," if os.path.ismount(folder) else ""
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{option}size={size}", "tmpfs", str(folder)], check=True)
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
