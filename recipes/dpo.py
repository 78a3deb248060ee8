"""Direct preference optimisation (Rafailov et al., 2023) of a stage's policy, or of a base model.

python recipes/dpo.py --config dpo.yaml --inputs.policy runs/sft --output_dir runs/dpo
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/dpo.py --config dpo.yaml ...
"""

from posttrain.errors import run_main


def main() -> None:
    from posttrain.training.stage import open_stage

    stage = open_stage("dpo")

    # Data
    train, validation, test = stage.load_train(), stage.load("validation_file"), stage.load("test_file")

    # Tokenizer, and all that can be checked before weights are read
    from posttrain.adapters import copied_reference
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

    # Trainer. The reference is made by TRL: a frozen copy of a continued adapter, or the model without its adapter.
    from trl import DPOTrainer

    with copied_reference(model):
        trainer = split(DPOTrainer, layout)(
            model,
            args=args,
            train_dataset=train.to_dataset(),
            eval_dataset=validation.to_dataset() if validation else None,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    gates.require(policy.before_dpo(stage, trainer), stage.run_dir)

    # Train
    stage.announce(trainer)
    stage.train(trainer)

    # Save, measure, prove
    policy.finish(stage, trainer, tokenizer, base=base, start=start, train=train, test=test)


if __name__ == "__main__":
    run_main(main)
