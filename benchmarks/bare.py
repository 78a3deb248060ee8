"""TRL's trainer as its documentation shows it: what `train.py` compares with.

Arguments: task, model, rows, output, bf16.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

task, model_dir, rows, out, bf16 = sys.argv[1:]
config_class, trainer_class = {
    "sft": (SFTConfig, SFTTrainer),
    "dpo": (DPOConfig, DPOTrainer),
    "reward": (RewardConfig, RewardTrainer),
}[task]
options = {"num_labels": 1} if task == "reward" else {}
model_class = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
trainer = trainer_class(
    model_class.from_pretrained(model_dir, dtype=torch.float32, **options),
    args=config_class(
        out,
        per_device_train_batch_size=16,
        num_train_epochs=1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_length=256,
        bf16=bf16 == "true",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        seed=0,
        disable_tqdm=True,
    ),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    processing_class=AutoTokenizer.from_pretrained(model_dir),
    peft_config=LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS" if task == "reward" else "CAUSAL_LM"
    ),
)
trainer.train()
