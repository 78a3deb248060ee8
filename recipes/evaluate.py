"""Exact match of a policy on held-out rows, greedy and sampled, each with its 95% interval.

python recipes/evaluate.py --inputs.policy runs/dpo --test_file test.jsonl --output_dir runs/dpo-eval
python recipes/evaluate.py --model_name_or_path MODEL --test_file test.jsonl --output_dir runs/base-eval
"""

from posttrain.errors import run_main


def main() -> None:
    from posttrain.training.stage import open_stage

    stage = open_stage("evaluate")

    # Data
    from posttrain.training import sampling

    test = sampling.load_test(stage)

    # Policy
    policy, tokenizer = sampling.load_policy_and_tokenizer(stage)

    # Measure and write
    sampling.evaluate(stage, policy, tokenizer, test)


if __name__ == "__main__":
    run_main(main)
