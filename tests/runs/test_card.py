"""A model card: the hub reads its metadata, its text is escaped, and editing it keeps the artifact valid."""

import json

import pytest
from huggingface_hub import ModelCard

from posttrain.runs.card import body, card_data, escape, write_card
from posttrain.runs.lineage import hash_files, read_lineage, verify
from posttrain.runs.paths import CARD
from report.planted import plant


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("chain"))


def test_the_hub_reads_the_cards_metadata(chain):
    run_dir = chain.run_dir("dpo")
    lineage = read_lineage(run_dir)
    write_card(run_dir / "adapter", lineage)
    card = ModelCard.load(run_dir / "adapter" / CARD)
    data = card.data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", "adapter", "peft")
    assert (data.pipeline_tag, data.tags) == ("text-generation", ["posttrain", "dpo", "trl", "lora"])
    assert data.license is None
    values = {r.metric_name: r.metric_value for r in data.eval_results}
    assert values["exact match, greedy"] == lineage.metrics["after"]["greedy_exact"]
    assert lineage.digest in card.text
    assert lineage.parents["policy"]["key"] in card.text


def test_editing_the_card_keeps_the_artifact_valid(chain):
    run_dir = chain.run_dir("reward")
    before = read_lineage(run_dir).digest
    write_card(run_dir / "adapter", read_lineage(run_dir))
    card = run_dir / "adapter" / CARD
    assert hash_files(run_dir, "adapter") == read_lineage(run_dir).files
    card.write_text(card.read_text() + "\nLicence: ours.\n")
    assert verify(run_dir).digest == before
    card.unlink()
    verify(run_dir)


def test_the_card_describes_a_merged_model_and_a_local_base(chain, tmp_path):
    lineage = read_lineage(chain.run_dir("sft"))
    assert card_data(lineage, merged=True).base_model_relation == "merge"
    assert 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER")' in body(lineage, merged=True)
    lineage.base["name"] = str(tmp_path)
    assert card_data(lineage).base_model is None
    assert str(tmp_path) not in body(lineage) + card_data(lineage).to_yaml()


def test_hostile_text_is_escaped_and_secrets_are_removed(chain):
    lineage = read_lineage(chain.run_dir("sft"))
    lineage.stage = "<script>| *x* `y`\n# z"
    lineage.config["hub_token"] = "hunter2x"
    lineage.config["loss_type"] = "hf_" + "a1" * 12
    lineage.data = {"a|b": {"rows": 1, "format": "<b>", "fingerprint": None}}
    text = body(lineage)
    assert "<script>" not in text
    assert "<b>" not in text
    assert "hunter2x" not in text
    assert "a1a1a1" not in text
    assert not [line for line in text.splitlines() if line.startswith("# z")]
    assert escape("a|b <i> _c_ `d` & #e\nf") == r"a\|b \<i\> \_c\_ \`d\` &amp; \#e f"
    json.dumps(card_data(lineage).to_dict())
