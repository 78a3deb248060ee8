"""A PPO trainer on the tiny model."""

from functools import partial

import pytest
from datasets import Dataset

from conftest import WORDS

PROMPTS = [f"{w[1:]} ->" for w in WORDS]


def count_e(prompts, completions, **columns):
    return [float(c.count("e")) for c in completions]


def build(
    tiny, out, *, base=None, rewards=count_e, reward_tokenizers=None, peft=True, continued=None, rows=None,
    tokenizer=None, r=4, dropout=0.0, **settings,
):  # fmt: skip
    """A trainer of 12 prompts, 8 tokens each at most."""
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.ppo import PPOConfig, PPOTrainer

    options = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_ppo_epochs": 2,
        "num_mini_batches": 1, "max_completion_length": 8, "learning_rate": 1e-2, "max_steps": 4,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "seed": 3,
        "output_dir": str(out),
    } | settings  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base or tiny, dtype=torch.float32)
    config = LoraConfig(r=r, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    if continued is not None:
        model = PeftModel.from_pretrained(model, continued, is_trainable=True)
    dataset = Dataset.from_list(rows or [{"prompt": p} for p in PROMPTS])
    return PPOTrainer(
        model,
        rewards,
        args=PPOConfig(**options),
        train_dataset=dataset,
        eval_dataset=dataset if "eval_strategy" in settings else None,
        processing_class=tokenizer or AutoTokenizer.from_pretrained(tiny),
        reward_processing_classes=reward_tokenizers,
        peft_config=config if peft and continued is None else None,
    )


@pytest.fixture
def make(tiny, tmp_path):
    """`make(rewards=..., continued=..., peft=..., **settings)`: a trainer, in this process."""
    return partial(build, tiny, tmp_path / "ppo")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """The folder of an adapter that changes the policy: what an SFT stage leaves."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_adapter(tiny, tmp_path_factory):
    """The folder of a reward model's adapter and score head, and the model itself."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(6)
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32)
    model = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("reward") / "adapter"
    model.save_pretrained(folder)
    return folder, model.eval()


def tensors(trainer):
    """The trained tensors by name, copied."""
    return {n: p.detach().clone() for n, p in trainer.model.trainable().items()}
