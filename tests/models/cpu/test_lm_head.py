"""The dense head against TRL's tiled one: the same numbers, the same gradients, the same trained adapter."""

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from posttrain.models.cpu import lm_head

ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_trls_tiles(softcap, biased):
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, requires_grad=True)
    weight, bias = torch.randn(50, 16), torch.randn(50) if biased else None
    targets, upstream = torch.randint(0, 50, (7,)), torch.randn(7)
    twin = hidden.detach().clone().requires_grad_()
    tiled = ChunkedLogProbFunction.apply(twin, weight, bias, targets, 0.7, 16, softcap, 1.3, ALL)
    dense = lm_head.logprobs(
        hidden, weight, bias, targets, temperature=0.7, softcap=softcap, logit_scale=1.3, outputs=ALL
    )
    for a, b in zip(dense, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    dense[0].backward(upstream)
    tiled[0].backward(upstream)
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-4, atol=1e-4)


def test_outputs_that_are_not_requested_are_none():
    results = lm_head.logprobs(
        torch.randn(3, 4), torch.randn(9, 4), None, torch.tensor([1, 2, 3]), outputs=("is_top1",)
    )
    assert [r is None for r in results] == [False, True, True, True, False]


@pytest.fixture
def dense(monkeypatch):
    for name in ("_ChunkedLogProbFunction", "_use_triton"):
        monkeypatch.setattr(utils, name, getattr(utils, name))
    assert lm_head.use_dense_lm_head()
    assert lm_head.use_dense_lm_head()  # twice does not wrap twice
    assert not isinstance(utils._ChunkedLogProbFunction.tiled, lm_head._DenseLogProb)


def trained(tiny, pairs, folder):
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        args=SFTConfig(
            str(folder),
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(folder / "cache")),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return weights, [h for h in trainer.state.log_history if "loss" in h]


def test_trains_the_same_adapter_and_logs_the_same(tiny, pairs, tmp_path, request):
    plain, plain_logs = trained(tiny, pairs, tmp_path / "a")
    request.getfixturevalue("dense")
    dense, dense_logs = trained(tiny, pairs, tmp_path / "b")
    assert plain.keys() == dense.keys()
    for name in plain:
        torch.testing.assert_close(dense[name], plain[name], rtol=1e-3, atol=1e-5)
    for a, b in zip(dense_logs, plain_logs, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy"):
            assert a[name] == pytest.approx(b[name], abs=1e-3), name


def test_past_the_budget_trls_tiles_are_used(dense, monkeypatch):
    monkeypatch.setattr(lm_head, "BUDGET_BYTES", 0)
    arguments = (torch.randn(3, 4), torch.randn(9, 4), None, torch.tensor([1, 2, 3]), 1.0, 4, None, 1.0, ("entropy",))
    tiled = utils._ChunkedLogProbFunction.apply(*arguments)
    torch.testing.assert_close(tiled[0], ChunkedLogProbFunction.apply(*arguments)[0])
