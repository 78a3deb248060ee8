"""Every method in every recipe: trained, saved, read by plain PEFT, continued, merged; or refused, with the reason.

On a tiny model, through the recipes themselves. A stage's own gates prove that its files reload, that a policy is taken
over whole, and for DPO that policy and reference are the SFT policy and the loss is ln 2.
"""

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from conftest import WORDS, run_here, write_conll, write_jsonl
from posttrain.adapters import load_policy, peft_config
from posttrain.config.peft_methods import DPO, METHODS, NER, PPO, REWARD, method_of
from posttrain.config.recipes import RECIPES
from posttrain.config.sections import AdapterSettings
from posttrain.errors import ArtifactError, ConfigError
from posttrain.models.generation import generate
from posttrain.models.scoring import score
from posttrain.ner.alignment import encode, predict, probe_logits
from posttrain.runs.answers import read_answers
from posttrain.training.gates import probe_logprobs
from posttrain.training.merge import merge

pytestmark = pytest.mark.slow

SMALL = [
    "--per_device_train_batch_size", "4", "--learning_rate", "0.01", "--logging_steps", "1",
    "--max_steps", "4", "--save_steps", "100", "--bf16", "false",
]  # fmt: skip
TEXT = ["--max_new_tokens", "4", "--test_rows", "6"]
# What fits a model of 32 features.
SIZES = {
    name: {key: 8 if key == "block_size" else 4}
    for key in ("r", "block_size", "num_virtual_tokens", "reduction_factor")
    for name, method in METHODS.items()
    if key in method.reads
}
ADAPTERS = [name for name in METHODS if name != "none"]


def test_the_sweep_covers_every_method_and_recipe():
    """19 methods in 5 recipes; the cells that are refused are these, and no others."""
    assert (len(METHODS), len(METHODS["lora"].tasks)) == (19, 5)
    refused = {(name, task) for name, method in METHODS.items() for task in method.refused}
    assert refused == {
        ("pissa", "ppo"), ("olora", "ppo"), ("adalora", "ppo"),
        ("prompt_tuning", "reward"), ("prompt_tuning", "ppo"),
        ("p_tuning", "reward"), ("p_tuning", "dpo"), ("p_tuning", "ppo"),
        ("prefix_tuning", "dpo"), ("prefix_tuning", "ppo"), ("p_tuning_v2", "ppo"),
    }  # fmt: skip


def settings(method, **more):
    return AdapterSettings(method=method, **SIZES.get(method, {}), **more)


def chosen(method):
    sizes = [word for key, value in SIZES.get(method, {}).items() for word in (f"--adapter.{key}", value)]
    return ["--adapter.method", method, *sizes]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """The tiny model, its rows, its pairs, and an SFT run of each method, made when it is asked for."""
    return World(tiny, tmp_path_factory.mktemp("cells"))


class World:
    def __init__(self, tiny, folder):
        self.tiny, self.folder = tiny, folder
        rows = [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS]
        self.rows = write_jsonl(folder / "rows.jsonl", rows)
        pairs = [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS]
        self.pairs = write_jsonl(folder / "pairs.jsonl", pairs)
        self.tokenizer = AutoTokenizer.from_pretrained(tiny)

    def base(self):
        return AutoModelForCausalLM.from_pretrained(self.tiny)

    def run(self, recipe, out, *arguments):
        gates = ["--gates.stops", "0"] if RECIPES[recipe].makes == "policy" else []
        run_here(recipe, *SMALL, *gates, *arguments, "--output_dir", out)
        lineage = json.loads((out / "lineage.json").read_text())
        losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [r["train/loss"] for r in losses if "train/loss" in r]
        assert len(losses) == 4
        assert all(map(math.isfinite, losses))
        assert all(gate["passed"] for gate in lineage["gates"])
        return lineage

    def sft(self, method):
        out = self.folder / method / "sft"
        if not out.exists():
            test = ["--test_file", self.rows, *TEXT]
            self.run("sft", out, "--model_name_or_path", self.tiny, "--train_file", self.rows, *test, *chosen(method))
        return out


def lineage_of(run):
    return json.loads((run / "lineage.json").read_text())


def outputs(model, run):
    return probe_logprobs(model.eval(), lineage_of(run)["metrics"]["probe"]["input_ids"])


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_table_of_methods_matches_a_fresh_adapter(world, method):
    ids, facts = [5, 9, 17, 4, 8], METHODS[method]
    base = probe_logprobs(world.base().eval(), ids)
    model = get_peft_model(world.base(), peft_config(settings(method), task="CAUSAL_LM", base=str(world.tiny))).eval()
    assert method_of(model.peft_config["default"]) == method
    difference = max(abs(a - b) for a, b in zip(probe_logprobs(model, ids), base, strict=True))
    assert (difference < 1e-4) == facts.identity
    if not facts.prompt_learning:
        off = probe_logprobs(model, ids, adapter=None)
        assert (max(abs(a - b) for a, b in zip(off, base, strict=True)) > 1e-2) == facts.mutates_base
    assert model.peft_config["default"].is_prompt_learning == facts.prompt_learning


@pytest.mark.parametrize("method", METHODS)
def test_sft(world, method, tmp_path):
    run, facts = world.sft(method), METHODS[method]
    lineage = lineage_of(run)
    expected = lineage["metrics"]["probe"]["logprobs"]
    base = outputs(world.base(), run)
    # It learned something; VeRA least of all.
    assert max(abs(a - b) for a, b in zip(expected, base, strict=True)) > 1e-4

    # Plain PEFT, on an untouched base: what moved is in the adapter's file, and nothing else moved.
    if method == "none":
        model = AutoModelForCausalLM.from_pretrained(run / "model")
    else:
        model = PeftModel.from_pretrained(world.base(), run / "adapter")
    assert outputs(model, run) == pytest.approx(expected, abs=1e-4)
    assert outputs(load_policy(run), run) == pytest.approx(expected, abs=1e-4)
    if facts.prompt_learning:  # its logits begin before the row does: by PEFT's own alignment of labels
        ids = torch.tensor([lineage["metrics"]["probe"]["input_ids"]])
        labels = torch.cat([torch.full((1, 1), -100), ids[:, 1:]], 1)
        loss = model(input_ids=ids, labels=labels).loss
        assert loss.item() == pytest.approx(-sum(expected) / len(expected), abs=1e-4)

    if method == "adalora":  # ranks were allocated: 1.5 x r at the start, r on average at the end
        ranks = json.loads((run / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
        assert {len(kept) for kept in ranks.values()} == {6}
        assert sum(map(sum, ranks.values())) == 4 * len(ranks)

    # The answers of the stage are those of a row alone, without padding.
    answers = read_answers(run / "answers" / "after.jsonl")
    assert len(answers) == 6
    assert [a.greedy for a in answers] == [alone(model, world.tokenizer, a.prompt) for a in answers]

    if facts.mergeable:
        merge(run, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert outputs(merged, run) == pytest.approx(expected, abs=1e-3)
    else:
        with pytest.raises(ArtifactError, match=r"cannot be merged|nothing to merge"):
            merge(run, tmp_path / "merged")


def alone(model, tokenizer, prompt):
    """One greedy completion by transformers' own loop, and PEFT's own way into it."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    mask = torch.ones_like(ids)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("method", ["lora", *(name for name in ADAPTERS if METHODS[name].prompt_learning)])
def test_a_batch_answers_as_its_rows_do(world, method):
    model, prompts = load_policy(world.sft(method)), [f"{w[1:]} ->" for w in WORDS]
    together = generate(model, world.tokenizer, prompts, temperatures=(0.0, 1.0), max_new_tokens=4, batch_size=64)
    assert [c[0].text for c in together] == [alone(model, world.tokenizer, p) for p in prompts]


def takeovers(method):
    facts = METHODS[method]
    return [s for s, can in (("continue", facts.continues), ("merge", facts.mergeable or method == "none")) if can]


def cells(task):
    """(method, how its SFT policy is taken over) for each method that the recipe allows."""
    return [(name, start) for name in METHODS if task in METHODS[name].tasks for start in takeovers(name)]


def go_on(world, recipe, method, start, tmp_path, *arguments):
    lineage = world.run(
        recipe, tmp_path / "run", "--inputs.policy", world.sft(method), *arguments, *chosen(method),
        "--adapter.start", start,
    )  # fmt: skip
    assert lineage["start"] == ("full" if method == "none" else start)
    return lineage


@pytest.mark.parametrize(("method", "start"), cells(REWARD))
def test_reward(world, method, start, tmp_path):
    lineage = go_on(world, "reward", method, start, tmp_path, "--train_file", world.pairs)
    probe = lineage["metrics"]["probe"]
    model, tokenizer = load_policy(tmp_path / "run"), AutoTokenizer.from_pretrained(tmp_path / "run" / lineage["kind"])
    assert score(model, tokenizer, probe["input_ids"]) == pytest.approx(probe["scores"], abs=1e-4)
    # By transformers' own pooling, and without padding.
    rows = [model(input_ids=torch.tensor([ids])).logits.item() for ids in probe["input_ids"]]
    assert rows == pytest.approx(probe["scores"], abs=1e-4)
    assert len(set(probe["scores"])) > 2
    if METHODS[method].mergeable and start == "merge":
        merge(tmp_path / "run", tmp_path / "merged")
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert score(merged, tokenizer, probe["input_ids"]) == pytest.approx(probe["scores"], abs=1e-3)


def test_a_prefix_makes_a_reward_model_of_a_base(world, tmp_path):
    lineage = world.run(
        "reward", tmp_path / "run", "--model_name_or_path", world.tiny, "--train_file", world.pairs,
        *chosen("prefix_tuning"),
    )  # fmt: skip
    assert [g["name"] for g in lineage["gates"]] == ["reload"]


# Virtual tokens go on only: a fresh set would be another policy than the one it is compared with.
DPO_CELLS = [(m, s) for m, s in cells(DPO) if METHODS[m].identity or s == "continue"]


@pytest.mark.parametrize(("method", "start"), DPO_CELLS)
def test_dpo(world, method, start, tmp_path):
    lineage = go_on(world, "dpo", method, start, tmp_path, "--train_file", world.pairs)
    facts = {"takeover", "step0 margin", "step0 loss", "step0 policy", "step0 reference"}
    assert facts <= {gate["name"] for gate in lineage["gates"]}
    probe = lineage["metrics"]["probe"]
    assert outputs(load_policy(tmp_path / "run"), tmp_path / "run") == pytest.approx(probe["logprobs"], abs=1e-3)
    assert moved(world.sft(method), tmp_path / "run") > 1e-5


def moved(start, run):
    """The largest difference of a policy's outputs from those of the policy it started from."""
    before = lineage_of(start)["metrics"]["probe"]["logprobs"]
    return max(abs(a - b) for a, b in zip(outputs(load_policy(run), start), before, strict=True))


@pytest.mark.parametrize(("method", "start"), cells(PPO))
def test_ppo(world, method, start, tmp_path):
    lineage = go_on(
        world, "ppo", method, start, tmp_path, "--train_file", world.rows, "--verifier", "exact_match",
        "--max_completion_length", "4",
    )  # fmt: skip
    assert {"takeover", "step0 policy", "step0 reference"} <= {gate["name"] for gate in lineage["gates"]}
    expected = lineage["metrics"]["probe"]["logprobs"]
    assert outputs(load_policy(tmp_path / "run"), tmp_path / "run") == pytest.approx(expected, abs=1e-3)
    assert moved(world.sft(method), tmp_path / "run") > 1e-5


@pytest.mark.parametrize("method", [name for name in METHODS if NER in METHODS[name].tasks])
def test_ner(world, tiny_bert, method, tmp_path):
    sentences = write_conll(tmp_path / "train.conll")
    run = tmp_path / "run"
    lineage = world.run(
        "ner", run, "--model_name_or_path", tiny_bert, "--train_file", sentences, "--test_file", sentences,
        "--max_length", "64", "--window_overlap", "8",
        *chosen(method),
    )  # fmt: skip
    labels, probe = lineage["metrics"]["labels"], lineage["metrics"]["probe"]
    assert len(probe["logits"]) == len(probe["input_ids"]) * len(labels)

    # Plain PEFT, on an untouched base.
    tokenizer = AutoTokenizer.from_pretrained(run / lineage["kind"])
    if method == "none":
        model = AutoModelForTokenClassification.from_pretrained(run / "model")
    else:
        base = AutoModelForTokenClassification.from_pretrained(tiny_bert, num_labels=len(labels))
        model = PeftModel.from_pretrained(base, run / "adapter").eval()
    for loaded in (model, load_policy(run)):
        assert probe_logits(loaded, probe["input_ids"]) == pytest.approx(probe["logits"], abs=1e-4)

    # What was found in a batch is what is found in a row alone, without padding.
    rows = [json.loads(line) for line in (run / "answers" / "test.jsonl").read_text().splitlines()]
    for row in rows:
        classes, _ = predict(model, tokenizer, encode([row["tokens"]], tokenizer, max_length=128, overlap=8))
        assert [labels[c] for c in classes[0]] == row["found"]

    if METHODS[method].mergeable:
        merge(run, tmp_path / "merged")
        merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
        assert probe_logits(merged, probe["input_ids"]) == pytest.approx(probe["logits"], abs=1e-3)
        assert merged.config.id2label == dict(enumerate(labels))


REFUSED = [(name, task) for name in METHODS for task in METHODS[name].refused]


@pytest.mark.parametrize(("method", "task"), REFUSED)
def test_combinations_known_to_fail_are_refused_with_an_alternative(world, method, task, tmp_path):
    with pytest.raises(ConfigError, match=f"{method} cannot train {task}: .*; use ({'|'.join(METHODS)})$"):
        run_here(task, *chosen(method), "--model_name_or_path", world.tiny, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["p_tuning", "prefix_tuning", "p_tuning_v2", "adalora", "pissa"])
def test_a_resumed_run_equals_the_uninterrupted_run(world, method, tmp_path):
    """These methods train tensors that are not in PEFT's own files."""
    from safetensors.torch import load_file

    arguments = [
        *SMALL, "--gates.stops", "0", *chosen(method), "--model_name_or_path", world.tiny, "--train_file", world.rows,
        "--save_steps", "1", "--max_steps", "16", "--save_total_limit", "16", "--learning_rate", "0.03",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_here("sft", *arguments, "--output_dir", whole)
    with pytest.MonkeyPatch.context() as patch:
        from posttrain.training.stage import Stage

        patch.setattr(Stage, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run_here("sft", *arguments, "--output_dir", cut)
    for step in range(6, 17):
        shutil.rmtree(cut / "checkpoints" / f"checkpoint-{step}")
    run_here("sft", *arguments, "--output_dir", cut)
    steps = [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 17))
    a, b = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def killed(*arguments):
    raise KeyboardInterrupt
