"""Downsampled curves: extremes stay, and short logs are kept as they are."""

import json
import math
import random
from itertools import pairwise

import pytest

from posttrain.report.curves import BUCKETS, Curve, read_log, sample_lines, trainer_name


def test_a_short_curve_is_not_downsampled():
    curve = Curve()
    values = [random.Random(0).gauss(0, 1) for _ in range(300)]
    for step, value in enumerate(values):
        curve.add(step, value)
    assert [(s, m) for s, _, m, _ in curve.points] == list(enumerate(values))


def test_a_long_curve_keeps_its_extremes_at_their_steps():
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(50_000)]
    values[31_111], values[42_000] = 99.0, -77.0
    curve = Curve()
    for step, value in enumerate(values):
        curve.add(step, value)
    points = curve.points
    assert len(points) <= 2 * BUCKETS
    for step, low, mean, high in points:
        bucket = values[int(step - (curve.width - 1) / 2) :][: curve.width]
        assert (low, high) == (min(bucket), max(bucket))
        assert mean == pytest.approx(sum(bucket) / len(bucket))
    at, *_ = max(points, key=lambda p: p[3])
    assert abs(at - 31_111) <= curve.width
    assert (curve.low, curve.high, curve.count) == (-77.0, 99.0, 50_000)


def test_steps_may_be_sparse_and_out_of_order():
    curve = Curve()
    for step in (10**9, 0, 5, 10**6):
        curve.add(step, float(step))
    assert [p[0] for p in curve.points] == [0, 5, 10**6, 10**9]


def test_values_that_are_not_finite_are_counted_but_not_drawn():
    curve = Curve()
    for value in (1.0, math.nan, math.inf, 10**400, 2.0):
        curve.add(1, value)
    assert (curve.not_finite, curve.count, curve.high) == (3, 2, 2.0)


def test_a_log_with_broken_lines_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [
        {"step": s, "max_steps": 9, "train/loss": 1.0 / s, "eval/loss": 2.0, "note": "x", "flag": True} for s in (1, 2)
    ]
    lines = [json.dumps(r) for r in good]
    path.write_text(
        "\n".join([*lines, "[1]", '{"step": "a"}', "\u0000", '{"step": 3, "train/loss": NaN}', '{"step": 4, "lo'])
    )
    log = read_log(path, lambda name: name == "loss")
    assert (log.records, log.broken, log.step, log.max_steps) == (3, 4, 3, 9)
    assert list(log.curves) == ["loss"]
    assert log.curves["loss"].not_finite == 1
    assert log.last["eval_loss"] == 2.0
    assert "flag" not in log.last


def test_dashboard_names_are_mapped_to_trainer_names():
    assert [trainer_name(n) for n in ("train/loss", "eval/f1_PER", "objective/kl", "train/rewards/margins")] == [
        "loss", "eval_f1_PER", "objective/kl", "rewards/margins",
    ]  # fmt: skip


def test_a_long_file_is_sampled_evenly(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps({"step": s, "pad": "x" * 2000}) + "\n" for s in range(900)))
    rows, whole = sample_lines(path, most=100)
    assert not whole
    assert len(rows) == 100
    gaps = [b["step"] - a["step"] for a, b in pairwise(rows)]
    assert min(gaps) >= 8 and max(gaps) <= 10
    rows, whole = sample_lines(path, most=10_000)
    assert whole
    assert [r["step"] for r in rows] == list(range(900))
