"""A reward model: one score per prompt and completion, trained on preference pairs (Bradley and Terry, 1952).

python recipes/reward.py --config reward.yaml --inputs.policy runs/sft --output_dir runs/reward
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/reward.py --config reward.yaml ...
"""

from posttrain.errors import run_main


def main() -> None:
    from posttrain.training.stage import open_stage

    stage = open_stage("reward")

    # Data
    train, validation = stage.load_train(), stage.load("validation_file")

    # Tokenizer, and all that can be checked before weights are read
    from posttrain.data.tokens import check_lengths
    from posttrain.models.loading import check_base, load_tokenizer
    from posttrain.training import policy, reward

    args = stage.trainer_args()
    base = check_base(policy.model_settings(stage), stage.policy)
    tokenizer = load_tokenizer(base, policy.model_settings(stage), trust_remote_code=args.trust_remote_code)
    policy.check_inputs(stage, tokenizer)
    reward.check_gate(stage, validation)
    reward.separate_pad_token(tokenizer)
    lengths = check_lengths(train, tokenizer, max_length=args.max_length)
    policy.log_lengths(lengths, args.max_length)

    # Model and adapter
    model, peft_config, start = policy.start(stage, base, task="SEQ_CLS")
    model.config.pad_token_id = tokenizer.pad_token_id

    # Trainer
    from trl import RewardTrainer

    trainer = RewardTrainer(
        model,
        args=args,
        train_dataset=train.to_dataset(),
        eval_dataset=validation.to_dataset() if validation else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )

    # Train
    stage.announce(trainer)
    stage.train(trainer)

    # Save, measure, prove
    reward.finish(stage, trainer, tokenizer, base=base, start=start, train=train, validation=validation)


if __name__ == "__main__":
    run_main(main)
