"""One run of one PPO trainer, for `ppo.py`: `ppo_contestant.py trl|head|adapter cost|learning|scale FOLDER OPTIONS`.

Writes FOLDER/report.json. Both trainers get the same model, prompts, rewards and settings. TRL 1.12 accepts neither
reward functions nor reward adapters on the policy's base; it gets models that compute the same.
"""

import json
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

name, task, folder, options = sys.argv[1], sys.argv[2], Path(sys.argv[3]), SimpleNamespace(**json.loads(sys.argv[4]))
LENGTH = {"cost": 32, "learning": 16, "scale": 128}[task]
MICRO, ACCUMULATED = {"cost": (4, 2), "learning": (64, 1), "scale": (getattr(options, "batch", 0), 1)}[task]
EPOCHS = {"cost": 2, "learning": 4, "scale": 1}[task]
RATE = {"cost": 1e-5, "learning": 3e-3, "scale": 1e-5}[task]
SHAPES = {  # hidden, layers, intermediate, heads, key-value heads, vocabulary
    "tiny": (64, 2, 128, 4, 2, 512),
    "135m": (576, 30, 1536, 9, 3, 49_152),
    "1b": (2048, 16, 8192, 32, 8, 128_256),
    "8b": (4096, 32, 14_336, 32, 8, 128_256),
}
VOCABULARY, TARGET = 64 if task != "scale" else SHAPES[options.size][-1] - 2, 7
PROMPT = 128  # tokens, of a `scale` prompt


def lora(task_type: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=TaskType(task_type))


def counting_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, w0, w1, ..., and distinct pad and EOS tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)} | {"[PAD]": VOCABULARY, "[EOS]": VOCABULARY + 1}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]", padding_side="left")


def counting_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY + 2, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=VOCABULARY, eos_token_id=VOCABULARY + 1, bos_token_id=None, tie_word_embeddings=False,
        initializer_range=0.1,  # or the frozen head could not tell one word from another by much
    )  # fmt: skip


class Counter(torch.nn.Module):
    """The share of TARGET among LENGTH tokens, in the shape of a sequence-classification model."""

    base_model_prefix = "trunk"

    def __init__(self) -> None:
        super().__init__()
        self.score = torch.nn.Identity()
        self.config = counting_config()

    def trunk(self, input_ids, **_):
        counted = (input_ids == TARGET).float().cumsum(1) / LENGTH
        return SimpleNamespace(hidden_states=[counted[..., None]])


def random_model() -> LlamaForCausalLM:
    """A Llama of the asked size with random weights, in the precision that it trains in."""
    hidden, layers, intermediate, heads, key_values, vocabulary = SHAPES[options.size]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=heads, num_key_value_heads=key_values, tie_word_embeddings=options.size == "135m",
        pad_token_id=VOCABULARY, eos_token_id=VOCABULARY + 1, bos_token_id=None,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlamaForCausalLM(config).to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def share_of_target(prompts, completions, completion_ids, **_) -> list[float]:
    return [ids.count(TARGET) / LENGTH for ids in completion_ids]


if task == "cost":
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"  # distinct from EOS: TRL 1.12 masks EOS away where they are one
    policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    rows = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
elif task == "scale":
    tokenizer = counting_tokenizer()
    torch.manual_seed(0)
    policy = random_model()
    prompts = [" ".join(f"w{(i * 31 + j * 7) % VOCABULARY}" for j in range(PROMPT)) for i in range(MICRO)]
else:
    tokenizer = counting_tokenizer()
    torch.manual_seed(options.seed)
    policy = LlamaForCausalLM(counting_config())
    # Four words, none of them the target.
    rows = [[8 + (31 * i + 7 * j) % (VOCABULARY - 8) for j in range(4)] for i in range(256)]
    prompts = [" ".join(f"w{t}" for t in row) for row in rows]

common = dict(
    output_dir=str(folder / "out"), per_device_train_batch_size=MICRO, gradient_accumulation_steps=ACCUMULATED,
    num_mini_batches=1, num_ppo_epochs=EPOCHS, learning_rate=RATE, lr_scheduler_type="constant", adam_epsilon=1e-5,
    kl_coef=getattr(options, "kl_coef", 0.05), gamma=1.0, lam=0.95, vf_coef=0.1, temperature=1.0,
    bf16=task == "scale" and torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, report_to="none", save_strategy="no",
    seed=getattr(options, "seed", 0), disable_tqdm=True,
)  # fmt: skip
phases: dict[str, float] = defaultdict(float)
updates: list[dict[str, float]] = []
began = time.perf_counter()


def update_ended(reward: float, kl: float, tokens: float = 0.0) -> None:
    global began
    now = time.perf_counter()
    updates.append({"seconds": now - began, "reward": reward, "kl": kl, "tokens": tokens, **phases})
    phases.clear()
    began = time.perf_counter()


def run_trl():
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    def timed(phase, function):
        def wrapper(*args, **kwargs):
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                phases[phase() if callable(phase) else phase] += time.perf_counter() - begun

        return wrapper

    drawn = []
    generation = timed("generation", ppo_trainer.batch_generation)

    def batch_generation(model, queries, *args):
        out = generation(model, queries, *args)
        ends = (out[0][:, queries.shape[1] :] == tokenizer.eos_token_id).cumsum(1)
        drawn.append(float(((ends == 0).sum(1) + (ends[:, -1] > 0)).float().mean()))
        return out

    ppo_trainer.batch_generation = batch_generation
    ppo_trainer.get_reward = timed(lambda: "scoring", ppo_trainer.get_reward)
    ppo_trainer.forward = timed(lambda: "forward" if torch.is_grad_enabled() else "evaluating", ppo_trainer.forward)
    if task == "cost":
        torch.manual_seed(0)
        value, reward = (
            AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
            for _ in range(2)
        )
    else:
        value, reward = LlamaForSequenceClassification(counting_config_of_values()), Counter()
    trainer = PPOTrainer(
        PPOConfig(
            **common, total_episodes=options.updates * MICRO * ACCUMULATED, response_length=LENGTH, stop_token="eos",
            local_rollout_forward_batch_size=MICRO * ACCUMULATED, num_sample_generations=0, logging_steps=1,
        ),
        tokenizer, policy, None, reward, Dataset.from_dict({"input_ids": rows}), value, peft_config=lora(),
    )  # fmt: skip
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    log = trainer.log

    def logged(metrics, *args, **kwargs):
        update_ended(metrics["objective/scores"], metrics["objective/kl"], drawn[-1])
        log(metrics, *args, **kwargs)

    trainer.log = logged
    return trainer


def counting_config_of_values() -> LlamaConfig:
    config = counting_config()
    config.num_labels = 1
    return config


def run_ours():
    from posttrain.ppo import PPOConfig, PPOTrainer

    reward = share_of_target
    if task == "cost":
        reward = folder / "reward" / "adapter"
        if not reward.is_dir():
            torch.manual_seed(0)
            scorer = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1)
            get_peft_model(scorer, lora("SEQ_CLS")).save_pretrained(reward)

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "objective/scores" in logs:
                phases.update({k.removeprefix("time/"): v for k, v in logs.items() if k.startswith("time/")})
                update_ended(logs["objective/scores"], logs["objective/kl"], logs["completions/mean_length"])

    return PPOTrainer(
        policy, reward,
        args=PPOConfig(
            **common, value_mode=name, max_steps=EPOCHS * options.updates, logging_steps=EPOCHS,
            max_completion_length=LENGTH,
            # TRL 1.12 does not clip gradients, and its critic is a model of its own, trained in full.
            **({"max_grad_norm": 0.0, "critic_learning_rate": 1e-2} if task == "learning" else {}),
        ),
        train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]), processing_class=tokenizer,
        peft_config=lora(), callbacks=[Watch()],
    )  # fmt: skip


trainer = run_trl() if name == "trl" else run_ours()
began = time.perf_counter()
trainer.train()

cuda = torch.cuda.is_available()
timed_updates = updates[1:] or updates  # the first one warms up
report = {
    "seconds": [u["seconds"] for u in timed_updates],
    "phases": {
        phase: sum(u.get(phase, 0.0) for u in timed_updates) / len(timed_updates)
        for phase in ("generation", "scoring", "evaluating", "forward", "backward")
    },
    "peak_bytes": (
        torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ),
    "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    "tokens": sum(u["tokens"] for u in timed_updates) / len(timed_updates),
    "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
    "parameters": sum(p.numel() for n, p in trainer.model.policy.named_parameters() if "lora_" not in n),
    "rollout_size": MICRO * ACCUMULATED,
    "prompt_tokens": PROMPT,
    "reward": [u["reward"] for u in updates],
    "kl": [u["kl"] for u in updates],
}
(folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
