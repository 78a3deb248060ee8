"""Proximal policy optimisation (Schulman et al., 2017) of a policy, rewarded by a reward model, a verifier, or both.

python recipes/ppo.py --config ppo.yaml --inputs.policy runs/sft --inputs.reward runs/reward --output_dir runs/ppo
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/ppo.py --config ppo.yaml ...
"""

from posttrain.errors import run_main


def main() -> None:
    from posttrain.training.stage import open_stage

    stage = open_stage("ppo")

    # Data
    train, validation, test = stage.load_train(), stage.load("validation_file"), stage.load("test_file")

    # Tokenizer, and all that can be checked before weights are read
    from posttrain.models.loading import check_base, load_tokenizer
    from posttrain.training import gates, policy, ppo

    args = stage.trainer_args()
    base = check_base(policy.model_settings(stage), stage.policy)
    tokenizer = load_tokenizer(base, policy.model_settings(stage), trust_remote_code=args.trust_remote_code)
    policy.check_inputs(stage, tokenizer)
    ppo.check_rewards(stage, train)

    # Model and adapter
    model, peft_config, start = policy.start(stage, base, task="CAUSAL_LM")
    rewards, reward_tokenizers = ppo.rewards(stage, start)

    # Trainer. Policy, critic, reference and reward model share one base if they are adapters of it.
    from posttrain.errors import as_config_errors
    from posttrain.ppo import PPOTrainer

    with as_config_errors():
        trainer = PPOTrainer(
            model,
            rewards,
            args=args,
            train_dataset=train.to_dataset(),
            eval_dataset=validation.to_dataset() if validation else None,
            processing_class=tokenizer,
            reward_processing_classes=reward_tokenizers,
            peft_config=peft_config,
        )
    gates.require(ppo.prove_roles(stage, trainer), stage.run_dir)

    # Train
    stage.announce(trainer)
    stage.train(trainer)

    # Save, measure, prove
    stage.metrics["health"] = trainer.health.to_list()
    policy.finish(stage, trainer, tokenizer, base=base, start=start, train=train, test=test)


if __name__ == "__main__":
    run_main(main)
