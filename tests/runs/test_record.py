"""The record of a stage: its names, and what a resume drops."""

import json

import pytest

from posttrain.runs.paths import COMPLETIONS, METRICS
from posttrain.runs.record import Record, drop_lines_after, metric_name, read_records


def test_a_resume_drops_lines_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3, 4)) + '{"step": 5, "lo')
    drop_lines_after(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_resumed_record_has_each_step_once(tmp_path):
    record = Record(tmp_path)
    for step in (1, 2, 3):
        record.log({"train/loss": 1 / step}, step, max_steps=4)
        record.log_completions([{"completion": "é", "score": step}], step)
    record.resume(2)
    record.log({"train/loss": 0.5}, 3)
    assert [r["step"] for r in read_records(tmp_path / METRICS)] == [1, 2, 3]
    assert [(r["step"], r["completion"]) for r in read_records(tmp_path / COMPLETIONS)] == [(1, "é"), (2, "é")]
    assert list(read_records(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0c"])
def test_a_completion_with_a_unicode_line_separator_is_read_back(tmp_path, sign):
    record = Record(tmp_path)
    record.log_completions([{"completion": f"a{sign}b"}], 1)
    record.resume(1)
    assert [r["completion"] for r in read_records(tmp_path / COMPLETIONS)] == [f"a{sign}b"]


@pytest.mark.parametrize(
    "name", ["loss", "eval_loss", "rewards/margins", "objective/kl", "train_runtime", "eval_rewards/x"]
)
def test_metric_names_follow_transformers_rule(name):
    from transformers.integrations.integration_utils import rewrite_logs

    assert [metric_name(name)] == list(rewrite_logs({name: 1.0}))


@pytest.mark.parametrize("name", ["time/forward", "perf/mfu", "memory/rss_gib", "final/after/rows", "train/loss"])
def test_a_prefixed_metric_name_is_kept(name):
    assert metric_name(name) == name
