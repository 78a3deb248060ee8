"""On-policy preference pairs: sample completions from a policy, score them, pair them into chosen and rejected.

    python recipes/sample.py --config sample.yaml --inputs.policy runs/sft --output_dir runs/sample
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sample.py --config sample.yaml ...

The judge is a verifier (`verifier: exact_match`, `regex:PATTERN` or `module:function`) or a reward model
(`--inputs.reward runs/reward`). A prompt whose completions all get the same score gives no pair.
"""

from posttrain.errors import run_main


def main() -> None:
    from posttrain.training.stage import open_stage

    stage = open_stage("sample")

    # Data and judge
    from posttrain.training import sampling

    prompts = stage.load_train()
    judge = sampling.find_judge(stage, prompts)

    # Policy
    policy, tokenizer = sampling.load_policy_and_tokenizer(stage)

    # Draw completions; a resumed run reads the batches that are already drawn
    completions = sampling.draw(stage, policy, tokenizer, prompts)

    # Score, rank, write
    pairs = sampling.rank(stage, judge, tokenizer, prompts, completions)
    sampling.finish(stage, pairs)


if __name__ == "__main__":
    run_main(main)
