"""Each finding is reported once, when it begins; `stop` and `rollback` end training."""

import pytest
import torch

from posttrain.ppo.health import PATIENCE, HealthWatch

from .conftest import tensors

WELL = {
    "objective/kl": 0.1, "objective/entropy": 1.0, "objective/scores_std": 0.5, "completions/mean_length": 5.0,
    "completions/stopped": 1.0, "value/explained_variance": 0.3,
}  # fmt: skip

ILL = {
    "not finite": {"objective/entropy": float("nan")},
    "kl runaway": {"objective/kl": 5.1},
    "entropy collapse": {"objective/entropy": 0.09},
    "length growth": {"completions/mean_length": 10.1, "completions/stopped": 0.4},
    "dead critic": {"value/explained_variance": -0.01},
    "reward saturation": {"objective/scores_std": 0.0},
}


def watch(metrics, on_unhealthy="warn", kl_target=None):
    health = HealthWatch(on_unhealthy, kl_target)
    for step, numbers in enumerate(metrics):
        health.look(step, numbers, None)
    return health


@pytest.mark.parametrize("name", ILL)
def test_each_finding_is_reported_at_its_limit(name):
    sick = {**WELL, **ILL[name]}
    with pytest.warns(UserWarning, match=name):
        health = watch([WELL] * PATIENCE + [sick] * 2 * PATIENCE + [WELL] + [sick] * PATIENCE)
    assert [f.name for f in health.findings] == [name] * 2  # it came back once
    assert not health.end


def test_a_healthy_run_has_no_findings():
    health = watch([WELL] * 20)
    assert health.findings == []


def test_with_kl_target_the_limit_on_kl_depends_on_it():
    with pytest.warns(UserWarning, match="kl runaway"):
        health = watch([WELL, {**WELL, "objective/kl": 0.5}], kl_target=0.1)
    assert health.findings[0].limit == pytest.approx(0.4)


@pytest.mark.filterwarnings("ignore:step")
@pytest.mark.parametrize("on_unhealthy", ["stop", "rollback"])
def test_a_run_with_runaway_kl_is_ended(make, on_unhealthy):
    """A huge learning rate and no KL term: the run ends early, with `rollback` at the weights of a healthy rollout."""
    options = {"learning_rate": 0.3, "kl_coef": 1e-9, "max_steps": 40, "kl_target": 1e-3, "kl_horizon": 10**9}
    trainer = make(on_unhealthy=on_unhealthy, **options)
    drawn_by = {}
    look = trainer.health.look

    def looking(step, metrics, model):
        drawn_by[step] = tensors(trainer)
        look(step, metrics, model)

    trainer.health.look = looking
    trainer.train()
    found = trainer.health.findings[0].step
    assert trainer.state.global_step == found + 1 < 40
    healthy = drawn_by[found - 2]  # a rollout is two steps
    back = all(torch.equal(tensor, healthy[name]) for name, tensor in tensors(trainer).items())
    assert back == (on_unhealthy == "rollback")
