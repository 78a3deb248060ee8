"""Every trainer stops at the end of a step on request, and gives the same result after a resume."""

import gc
import json

import pytest

from conftest import WORDS, run_here, write_conll, write_jsonl
from posttrain.distributed.checkpoints import WRITTEN_BY
from posttrain.errors import StoppedError

SMALL = [
    "--per_device_train_batch_size", "4", "--gradient_checkpointing", "false", "--adapter.r", "4", "--adapter.alpha",
    "8", "--logging_steps", "1", "--save_steps", "100", "--learning_rate", "0.01", "--max_steps", "4",
]  # fmt: skip
POLICY = [*SMALL, "--gates.stops", "0", "--max_new_tokens", "4"]


@pytest.fixture(scope="module")
def files(tiny, tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop")
    rows = write_jsonl(folder / "rows.jsonl", [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS])
    pairs = write_jsonl(
        folder / "pairs.jsonl", [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS]
    )
    tagged = write_conll(folder / "tagged.conll")
    base = ["--model_name_or_path", str(tiny)]
    run_here("reward", *base, "--train_file", pairs, "--output_dir", folder / "judge", *SMALL)
    return folder, {
        "sft": [*base, "--train_file", rows, *POLICY],
        "reward": [*base, "--train_file", pairs, *SMALL],
        "dpo": [*base, "--train_file", pairs, *POLICY],
        # Stops in the middle of a rollout: two steps each.
        "ppo": [*base, "--inputs.reward", folder / "judge", "--train_file", rows, *POLICY,
                "--max_completion_length", "4", "--num_ppo_epochs", "2"],
        # Two steps per epoch, and an evaluation at its end.
        "ner": ["--model_name_or_path", tiny_bert, "--train_file", tagged, "--validation_file", tagged, *SMALL,
                "--per_device_train_batch_size", "3", "--max_length", "64", "--gates.f1", "0"],
    }  # fmt: skip


def logged(run_dir, key):
    return [
        r["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines() if key in (r := json.loads(line))
    ]


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "ppo", "ner"])
def test_a_stopped_run_ends_as_an_undisturbed_one(files, recipe, monkeypatch):
    folder, arguments = files
    whole, cut = folder / f"{recipe}-whole", folder / f"{recipe}-cut"
    run_here(recipe, *arguments[recipe], "--output_dir", whole)
    monkeypatch.setenv("POSTTRAIN_STATE", str(folder))
    (folder / "stop").touch()
    epoch = {"sft": 3, "reward": 3, "dpo": 3, "ner": 2}.get(recipe)  # steps in one
    for step in (s for s in (1, 2, 3) if s != epoch):
        with pytest.raises(StoppedError, match=f"stopped as asked, after step {step};"):
            run_here(recipe, *arguments[recipe], "--output_dir", cut)
        gc.collect()  # the stopped run's lock
        assert (cut / "checkpoints" / f"checkpoint-{step}" / WRITTEN_BY).is_file()
        assert not (cut / "lineage.json").exists()
    run_here(recipe, *arguments[recipe], "--output_dir", cut)  # the next step is the last: there is nothing to stop
    (folder / "stop").unlink()
    a, b = (run / "adapter" / "adapter_model.safetensors" for run in (whole, cut))
    assert a.read_bytes() == b.read_bytes()
    for key in ("train/loss", "eval/loss"):
        assert logged(cut, key) == logged(whole, key), key


def test_drawing_stops_between_two_batches(files, tiny, monkeypatch):
    folder, arguments = files
    rows = arguments["sft"][3]
    command = ["--model_name_or_path", tiny, "--train_file", rows, "--verifier", "regex:[a-m].*", "--num_samples", "4",
               "--temperature", "2.0", "--max_new_tokens", "4", "--generation_batch_size", "16"]  # fmt: skip
    run_here("sample", *command, "--output_dir", folder / "sample-whole")
    monkeypatch.setenv("POSTTRAIN_STATE", str(folder))
    (folder / "stop").touch()
    with pytest.raises(StoppedError, match="with 0 of 12 prompts drawn"):
        run_here("sample", *command, "--output_dir", folder / "sample-cut")
    gc.collect()
    drawn = folder / "sample-cut" / "drawn"
    drawn.joinpath("0000000.json").write_text((folder / "sample-whole" / "drawn" / "0000000.json").read_text())
    with pytest.raises(StoppedError, match="with 4 of 12 prompts drawn"):
        run_here("sample", *command, "--output_dir", folder / "sample-cut")
    gc.collect()
    (folder / "stop").unlink()
    run_here("sample", *command, "--output_dir", folder / "sample-cut")
    a, b = (folder / f"sample-{which}" / "data" / "train.jsonl" for which in ("whole", "cut"))
    assert a.read_bytes() == b.read_bytes()
