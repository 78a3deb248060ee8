"""The demo's two chains: the short one and the full one."""

import pytest

from posttrain.chain.graph import read_chain
from posttrain.cli import DEMO_CHAIN, FULL_DEMO_CHAIN, main
from posttrain.config.sections import EvaluationSettings
from posttrain.launch import ROOT


@pytest.mark.parametrize("chain", [DEMO_CHAIN, FULL_DEMO_CHAIN])
def test_a_stage_is_measured_on_the_rows_of_its_policy(chain):
    """Otherwise its change would be unknown, and the table could not tell whether it is better than SFT."""
    stages = {stage.name: stage for stage in read_chain(ROOT / chain).stages}
    compared = []
    for stage in stages.values():
        policy = stages.get(stage.parents.get("policy", ""))
        if policy is not None and stage.config.recipe in ("dpo", "ppo"):
            compared.append(stage.name)
            after, before = (s.config.part(EvaluationSettings) for s in (stage, policy))
            assert after == before
    assert compared == (["dpo", "ppo"] if chain == DEMO_CHAIN else ["dpo", "ppo", "ppo-verifier"])


def test_the_demos_do_not_overwrite_each_other():
    short, full = (read_chain(ROOT / chain) for chain in (DEMO_CHAIN, FULL_DEMO_CHAIN))
    assert short.name != full.name
    assert short.output_dir.resolve() != full.output_dir.resolve()


def test_full_and_ner_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as error:
        main(["demo", "--full", "--ner"])
    assert error.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
