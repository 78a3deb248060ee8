"""Supervised fine-tuning: the first stage of a chain.

python recipes/sft.py --config recipes/configs/smollm2-135m/sft.yaml --output_dir runs/sft
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py --config ... --output_dir runs/sft
"""

from posttrain.errors import run_main


def main() -> None:
    from posttrain.training.stage import open_stage

    stage = open_stage("sft")

    # Data
    train, validation, test = stage.load_train(), stage.load("validation_file"), stage.load("test_file")

    # Tokenizer, and all that can be checked before weights are read
    from posttrain.data.tokens import check_lengths
    from posttrain.distributed.split.layout import read_layout
    from posttrain.distributed.split.trainer import split
    from posttrain.models.loading import check_base, load_tokenizer
    from posttrain.training import gates, policy

    args = stage.trainer_args()
    base = check_base(policy.model_settings(stage), stage.policy)
    tokenizer = load_tokenizer(base, policy.model_settings(stage), trust_remote_code=args.trust_remote_code)
    policy.check_inputs(stage, tokenizer)
    layout = read_layout(stage.config, base)
    lengths = check_lengths(train, tokenizer, max_length=args.max_length)
    policy.log_lengths(lengths, args.max_length)

    # Model and adapter
    model, peft_config, start = policy.start(stage, base, task="CAUSAL_LM")

    # Trainer
    from trl import SFTTrainer

    trainer = split(SFTTrainer, layout)(
        model,
        args=args,
        train_dataset=train.to_dataset(),
        eval_dataset=validation.to_dataset() if validation else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    gates.require([gates.eos_is_learned(trainer, tokenizer)], stage.run_dir)

    # Train
    stage.announce(trainer)
    stage.train(trainer)

    # Save, measure, prove
    policy.finish(stage, trainer, tokenizer, base=base, start=start, train=train, test=test)


if __name__ == "__main__":
    run_main(main)
