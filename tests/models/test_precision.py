"""The precision that is chosen, what is refused, and which parameters have an fp32 master."""

import pytest

from posttrain.errors import ConfigError
from posttrain.models import precision
from posttrain.models.precision import decide, describe_weights


@pytest.fixture
def on_cpu(monkeypatch):
    import torch

    for name in ("ACCELERATE_USE_DEEPSPEED", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_fp16_is_refused_on_a_cpu(on_cpu):
    with pytest.raises(ConfigError, match=r"fp16: true needs a GPU .* use bf16: true"):
        decide({"fp16": True})
    on_cpu.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="fp16: true needs a GPU"):
        decide({"fp16": True})


def test_bf16_defaults_to_the_processors_support(on_cpu):
    for found in (True, False):
        on_cpu.setattr(precision, "has_bf16", lambda found=found: found)
        assert decide({"bf16": None}) == {"bf16": found, "use_cpu": True}
        assert [decide({"bf16": said})["bf16"] for said in (True, False)] == [True, False]


def test_deepspeed_on_cpu_processes(on_cpu):
    on_cpu.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    on_cpu.setenv("WORLD_SIZE", "2")
    assert decide({"bf16": None}) == {"bf16": False, "use_cpu": False, "ddp_backend": "gloo"}
    with pytest.raises(ConfigError, match="bf16: true under DeepSpeed needs a GPU"):
        decide({"bf16": True})


def test_parameters_trained_in_16_bits_are_reported():
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    assert describe_weights(model) is None
    model[1].to(torch.bfloat16)
    assert describe_weights(model).startswith("4 of 19 trained parameters are bfloat16 without an fp32 master")
    model[1].requires_grad_(False)
    assert describe_weights(model) is None
    # the share in the message, checked with torch: no smaller update changes a bf16 weight
    assert "1/512 of a weight" in describe_weights(torch.nn.Linear(1, 1).to(torch.bfloat16))
    weights = torch.arange(0x3F80, 0x4080, dtype=torch.int16).view(torch.bfloat16).float()  # every one from 1 to 4
    kept = [
        ((weights * (1 - share)).bfloat16() != weights.bfloat16()).float().mean() for share in (0.999 / 512, 1 / 256)
    ]
    assert kept[0] == 0 and kept[1] > 0.99


CASES = {
    # name: (recipe, arguments, what of the trained parameters has no master)
    "LoRA on fp32": ("sft", ["--adapter.r", 4], None),
    "LoRA on bf16": ("sft", ["--adapter.r", 4, "--dtype", "bfloat16"], None),
    "full fp32": ("sft", ["--adapter.method", "none"], None),
    "full bf16": ("sft", ["--adapter.method", "none", "--dtype", "bfloat16"], "all"),
    "the score head of LoRA on bf16": ("reward", ["--adapter.r", 4, "--dtype", "bfloat16"], "score"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bf16_runs_keep_fp32_masters(case, tiny, pairs, preferences, tmp_path, capsys):
    """Full recipe runs: `bf16: true` computes in bf16 on fp32 weights, so updates below bf16's spacing are kept."""
    import torch
    from safetensors.torch import load_file

    from conftest import run_here

    recipe, extra, without = CASES[case]
    rows = pairs if recipe == "sft" else preferences
    out = tmp_path / "run"
    run_here(
        recipe, "--model_name_or_path", tiny, "--train_file", rows, "--output_dir", out, "--bf16", "true",
        "--max_steps", 3, "--learning_rate", 1e-5, "--per_device_train_batch_size", 4, *extra,
        *([] if recipe == "reward" else ["--gates.stops", 0, "--gradient_checkpointing", "false"]),
    )  # fmt: skip
    said = capsys.readouterr().out
    saved = load_file(next(out.glob("*/*.safetensors")))
    trained = {k: v for k, v in saved.items() if "lora_" in k or "score" in k or "full" in case}
    sixteen = {k for k, v in trained.items() if v.dtype == torch.bfloat16}
    assert trained and "bf16" in said
    if without is None:
        assert not sixteen and "without an fp32 master" not in said
        assert any(not torch.equal(v, v.bfloat16().float()) for v in trained.values())  # bits that bf16 has not
    else:
        assert "without an fp32 master" in said
        assert sixteen == (set(trained) if without == "all" else {k for k in trained if "score" in k})
