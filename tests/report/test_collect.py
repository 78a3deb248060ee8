"""The data of a report: every state of a stage, and only measured numbers."""

import fcntl
import json
import random

import pytest

from posttrain.chain.graph import read_chain
from posttrain.chain.run import state_folder
from posttrain.config.recipes import RECIPES
from posttrain.intervals import Share
from posttrain.report.charts import rails
from posttrain.report.collect import Measure, read_facts
from posttrain.report.page import render

from .planted import HEALTH, logs, plant, write_chain, write_logs


def by_name(chain):
    return {s.name: s for s in read_facts(chain).stages}


def test_facts_of_a_complete_chain(tmp_path):
    stages = by_name(plant(tmp_path))
    assert {s.state for s in stages.values()} == {"complete"}
    sft, reward, ppo = stages["sft"], stages["reward"], stages["ppo"]
    assert [m.name for m in sft.measures] == ["exact match, greedy", "exact match, sampled"]
    m = sft.lineage.metrics
    assert sft.measures[0].after == Share(
        m["after"]["greedy_exact"], m["after"]["greedy_exact_low"], m["after"]["greedy_exact_high"], 40
    )
    assert sft.measures[0].verdict == "better"
    # Wilson's interval of 40 of 50, from Wilson (1927) by hand.
    assert (reward.measures[0].after.low, reward.measures[0].after.high) == pytest.approx((0.6696, 0.8876), abs=1e-4)
    assert reward.measures[0].before is None
    assert [(p.role, p.stage, p.same) for p in reward.parents] == [("policy", "sft", True), ("data", "sample", True)]
    assert ppo.notes[0].step == HEALTH["step"]
    assert ppo.log.step == ppo.log.max_steps == 60
    assert len(ppo.completions) == 60
    assert set(stages["dpo"].log.curves) >= {"loss", "rewards/margins", "logps/chosen"}


def test_every_metric_of_the_curated_panels_is_drawn(tmp_path):
    stages = by_name(plant(tmp_path))
    for name in ("sft", "reward", "dpo", "ppo"):
        logged = logs(name, 1, 1, random.Random(0)).keys()
        drawn = {metric for panel in RECIPES[name].all_panels for metric in panel.find(stages[name].log.curves)}
        assert logged == drawn


def test_an_incomplete_chain_lists_what_is_missing(tmp_path):
    chain = plant(tmp_path, stages=("sft", "sample"))
    reward = chain.run_dir("reward")
    reward.mkdir()
    (reward / "stage.json").write_text("{}")
    state = state_folder(chain, "reward")
    state.mkdir(parents=True)
    write_logs(reward, "reward", steps=60, until=21)
    (chain.output_dir / ".logs" / "reward.stderr").write_text(
        "h.py:70: UserWarning: step 8: dead critic (0, limit 0). Raise vf_coef.\n"
    )
    report = {"rank": 0, "node": "here", "time": 1.0, "message": "RuntimeError: boom,\n  with api_key=abcdefgh"}
    (state / "exit-1.rank-0").write_text(json.dumps(report))
    dpo = chain.run_dir("dpo")
    dpo.mkdir()
    (dpo / "stage.json").write_text("{}")
    failed = {"name": "stops", "passed": False, "value": 0.1, "accepted": "at least 0.5", "advice": "Train longer."}
    (dpo / "gates.json").write_text(json.dumps([failed]))
    facts = read_facts(chain)
    stages = {s.name: s for s in facts.stages}
    assert {n: s.state for n, s in stages.items()} == {
        "sft": "complete", "sample": "complete", "reward": "cut off", "dpo": "gate failed", "ppo": "not started",
    }  # fmt: skip
    assert stages["reward"].why == "at step 21 of 60; its last error: RuntimeError: boom, with api_key=[redacted]"
    assert [(n.step, n.text, n.advice) for n in stages["reward"].notes] == [
        (8, "dead critic: 0, limit 0", "Raise vf_coef.")
    ]
    assert "stops: 0.1, must be at least 0.5" in stages["dpo"].why
    assert [line.split(":")[0] for line in facts.missing] == ["reward", "dpo", "ppo"]

    with (reward / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert by_name(chain)["reward"].state == "running"


def test_alerts_are_read_before_stderr(tmp_path):
    chain = write_chain(tmp_path)
    run_dir = chain.run_dir("ppo")
    run_dir.mkdir(parents=True)
    (run_dir / "stage.json").write_text("{}")
    alerts = [
        {"step": 4, "title": "loss is not finite", "text": "step 4: the loss is nan. Lower learning_rate."},
        {"step": 9, "title": "kl runaway", "text": "step 9: kl runaway (8, limit 4). Raise kl_coef."},
    ]
    (run_dir / "alerts.jsonl").write_text("".join(json.dumps(a) + "\n" for a in alerts) + '{"step": 1')
    assert [(n.step, n.text) for n in by_name(chain)["ppo"].notes] == [
        (4, "loss is not finite"),
        (9, "kl runaway: 8, limit 4"),
    ]


def test_a_changed_parent_and_a_damaged_lineage_are_reported(tmp_path):
    chain = plant(tmp_path, stages=("sft", "sample"))
    sft = chain.run_dir("sft") / "lineage.json"
    document = json.loads(sft.read_text())
    document["files"]["adapter/weights"] = "0" * 64
    sft.write_text(json.dumps(document))
    assert [p.same for p in by_name(chain)["sample"].parents] == [False]
    sft.write_text("{")
    assert by_name(chain)["sft"].state == "damaged"


@pytest.mark.parametrize(
    ("key", "value"),
    [("metrics", {"health": [{}]}), ("metrics", None), ("config", []), ("parents", {"policy": {}}), ("cost", None),
     ("metrics", {"after": {"greedy_exact": "x"}}), ("metrics", {"after": {"greedy_exact": 2}})],
)  # fmt: skip
def test_an_invalid_lineage_is_shown_as_damaged(tmp_path, key, value):
    chain = plant(tmp_path, stages=("sft",))
    path = chain.run_dir("sft") / "lineage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    facts = read_facts(chain)
    assert facts.stages[0].state == "damaged"
    assert "sft: damaged; lineage.json" in facts.missing[0]
    render(facts)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"name": "x"}]', '[{"name": 1, "passed": 1, "value": "a", "accepted": ""}]']
)
def test_unreadable_gates_are_reported(tmp_path, text):
    chain = plant(tmp_path, stages=("sft",))
    (chain.run_dir("sft") / "gates.json").write_text(text)
    assert "gates.json failed" in by_name(chain)["sft"].notes[0].text


def test_changed_configuration_is_listed(tmp_path):
    plant(tmp_path, stages=("sft",))
    file = tmp_path / "sft.yaml"
    file.write_text(file.read_text().replace("0.001", "0.002"))
    assert by_name(read_chain(tmp_path / "chain.yaml"))["sft"].changed == ["learning_rate: 0.001 then, 0.002 now"]


def test_the_verdict_depends_on_whether_the_interval_contains_zero():
    after = Share(0.5, 0.4, 0.6, 10)
    changes = {(0.01, 0.2): "better", (-0.2, -0.01): "worse", (-0.1, 0.1): "no clear change"}
    assert all(Measure("m", after, after, Share(0, *ends, 10)).verdict == word for ends, word in changes.items())
    assert Measure("m", after).verdict == ""


def test_overlapping_rails_get_different_lanes():
    stages = [("sft", {}), ("sample", {"policy": "sft"}), ("reward", {"policy": "sft", "data": "sample"}),
              ("dpo", {"policy": "sft", "data": "sample"}), ("late", {"policy": "dpo"})]  # fmt: skip
    found = {(parent, role): (children, lane) for parent, role, children, lane in rails(stages)}
    assert found["sft", "policy"][0] == ["sample", "reward", "dpo"]
    assert found["sample", "data"][0] == ["reward", "dpo"]
    place = {name: n for n, (name, _) in enumerate(stages)}
    spans = [(place[p], place[c[-1]], lane) for (p, _), (c, lane) in found.items()]
    for i, (start, end, lane) in enumerate(spans):
        for other_start, other_end, other_lane in spans[:i]:
            assert lane != other_lane or end < other_start or other_end < start
