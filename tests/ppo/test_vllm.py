"""Without vLLM, which needs a GPU: it is refused here, and handing weights to it does not change the base."""

import pytest
import torch

from posttrain.ppo.actor_critic import POLICY
from posttrain.ppo.vllm import kept_base_weights


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_vllm_is_refused_without_cuda_or_the_package(make):
    with pytest.raises(ValueError, match="use_vllm: it needs a CUDA device"):
        make(use_vllm=True)


def test_merging_for_vllm_leaves_the_base_unchanged(make, adapter):
    """Twenty merges in bf16; without the copy they change the base."""
    model = make(continued=adapter).model
    model.policy.to(torch.bfloat16)
    base = {n: p.detach().clone() for n, p in model.policy.named_parameters() if "base_layer" in n}

    def hand_over():
        with model.role(POLICY):
            model.policy.merge_adapter()
            model.policy.unmerge_adapter()

    def changed():
        return sum(not torch.equal(p, base[n]) for n, p in model.policy.named_parameters() if n in base)

    for _ in range(20):
        with kept_base_weights(model.policy):
            hand_over()
    assert changed() == 0
    hand_over()
    assert changed() > 0
