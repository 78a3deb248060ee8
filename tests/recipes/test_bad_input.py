"""Bad input from a user: exit code 2, one message that says what to change, no traceback, nothing written."""

import json

import pytest

from conftest import run_recipe

GOOD = {"prompt": "a ->", "completion": " b"}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}

ROWS = {
    "broken JSON": ('{"prompt": "a"', r"row 2: broken JSON at column"),
    "wrong columns": ({"question": "a", "answer": "b"}, "row 2: field 'completion' is missing"),
    "empty completion": ({"prompt": "a", "completion": ""}, "row 2: completion: is empty"),
    "non-string content": ({"prompt": "a", "completion": {"x": 1}}, "row 2: completion: expected text, got dict"),
    "roles out of order": (
        {"prompt": [ASSISTANT, USER], "completion": [ASSISTANT]},
        "row 2: prompt[0].role: expected 'user', got 'assistant'",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row(name, tiny, tmp_path):
    row, message = ROWS[name]
    second = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(GOOD)}\n{second}\n")
    check(tmp_path, tiny, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "t.jsonl does not exist"),
        ("", "t.jsonl is empty"),
        ('{"question": "a", "answer": "b"}\n', "match no known format"),
    ],
)
def test_a_bad_file(content, message, tiny, tmp_path):
    if content is not None:
        (tmp_path / "t.jsonl").write_text(content)
    check(tmp_path, tiny, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["--learning_rate", "fast"], "learning_rate must be a number, got 'fast'"),
        (["--adapter.r", "0"], "adapter.r must be at least 1, got 0"),
        (["--adapter.method", "lra"], "adapter.method must be one of lora, rslora, dora, pissa"),
        (["--inputs.reward", "x"], "unknown key 'inputs.reward'"),
        (["--learning_rate"], "--learning_rate has no value"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_bad_key_or_value(arguments, message, tiny, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(GOOD) + "\n")
    check(tmp_path, tiny, message, *arguments)


def test_a_hub_dataset_that_cannot_be_reached(tiny, tmp_path):
    out = tmp_path / "o"
    done = run_recipe(
        "sft", "--model_name_or_path", tiny, "--dataset_name", "no-such/rows", "--output_dir", out, expect=2,
        env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert "dataset_name: cannot load 'no-such/rows' (split 'train')" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "adapter").exists()


def check(tmp_path, tiny, message, *more):
    out = tmp_path / "o"
    done = run_recipe(
        "sft", "--model_name_or_path", tiny, "--train_file", tmp_path / "t.jsonl", "--output_dir", out, *more, expect=2
    )
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error:") == 1
    assert not (out / "lineage.json").exists()
    assert not list(out.glob("*.safetensors"))


def test_without_CI_in_the_environment(tiny, pairs, tmp_path):
    """TRL takes another path when CI is set (telemetry, model types): a user's machine has it unset."""
    import os
    import subprocess
    import sys

    from conftest import ROOT

    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    command = [
        sys.executable, str(ROOT / "recipes" / "sft.py"), "--model_name_or_path", str(tiny), "--train_file", str(pairs),
        "--max_steps", "1", "--gates.stops", "0", "--max_new_tokens", "2", "--gradient_checkpointing", "false",
        "--output_dir", str(tmp_path / "o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "o" / "lineage.json").is_file()
