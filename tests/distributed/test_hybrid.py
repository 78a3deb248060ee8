"""Models that are split over processes train as they do on one: tensor, pipeline, and both with copies.

`split_runs.py` trains every cell of its table, split and on one process, with clipping at work in each step. AdamW
hides a gradient that is wrong by a factor; the length of the gradient does not.
"""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from distributed.split_runs import CELLS, RESUMED, SAVED, STEPS, Cell, chosen

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """The folder of all runs."""
    out = tmp_path_factory.mktemp("split")
    shutil.copytree(tiny, out / "tiny")
    command = [sys.executable, ROOT / "tests" / "distributed" / "split_runs.py", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


def read(runs, name):
    return torch.load(runs / f"{name}.pt", weights_only=True)


# In bf16 sums are rounded, in another order: Adam's step, 2e-3 long, may turn where a gradient is nearly 0.
EXACT, ROUNDED = 1e-5, 2e-3


def tolerance(cell: Cell) -> float:
    return ROUNDED if cell.options.get("bf16") else EXACT


def assert_same(got, expected, cell: Cell):
    """Every logged number and every tensor; in bf16 without the metrics, one of which counts right tokens."""
    near = tolerance(cell)
    for ours, theirs in zip(got["log"], expected["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs if near == EXACT else ("loss", "grad_norm", "learning_rate"):
            assert ours[key] == pytest.approx(theirs[key], abs=near, rel=near), key
    assert_close(got["state"], expected["state"], near)


def assert_close(got, expected, near):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=near, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_the_sweep_covers_every_kind_of_split():
    assert len(CELLS) == len({c.name for c in CELLS}) == 51
    for layout in ((1, 1, 2), (1, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)):
        cells = [c for c in CELLS if c.layout == layout]
        assert {c.trainer for c in cells} == {"sft", "dpo"}, layout
        assert {c.method for c in cells} >= {"lora", "full"}, layout
    for layout in ((1, 1, 2), (1, 2, 1)):
        kinds = {(c.trainer, c.method, c.model) for c in CELLS if c.layout == layout}
        assert kinds >= {(t, m, k) for t in ("sft", "dpo") for m in ("lora", "full") for k in ("tied", "untied")}
    assert {c.schedule for c in CELLS if c.trainer == "dpo"} == {"1f1b", "gpipe"}


@pytest.mark.parametrize("cell", chosen(CELLS), ids=lambda c: c.name)
def test_a_split_model_trains_as_on_one_process(runs, cell: Cell):
    split, one = read(runs, cell.name), read(runs, cell.same)
    assert len(one["log"]) == STEPS
    assert all(record["grad_norm"] > 0.05 for record in one["log"]), "clipping was not at work"
    assert_same(split, one, cell)
    assert split["apart"] == 0, "processes hold different models at the end"
    assert split["trainer"].startswith("Split")
    assert split["wrapper"] == one["wrapper"]
    # A process held its share: less than the full model, and together at least all copies.
    assert max(split["held"]) < one["parameters"]
    assert sum(split["held"]) >= one["parameters"] * cell.layout[0]


@pytest.mark.parametrize("cell", chosen(CELLS), ids=lambda c: c.name)
def test_the_saved_model_loads_without_the_split(runs, cell: Cell):
    """Plain peft and transformers read the result, and the checkpoint is that of one process, file by file."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from posttrain.training.gates import TOLERANCE, probe_logprobs

    split = read(runs, cell.name)
    folder, dtype = runs / cell.name / "result", torch.bfloat16 if cell.options.get("bf16") else torch.float32
    if cell.method == "full":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs / cell.model, dtype=dtype), folder)
    near = EXACT if dtype == torch.float32 else TOLERANCE["bfloat16"]
    assert probe_logprobs(model, list(range(5, 40))) == pytest.approx(split["probe"], abs=near)

    ours, theirs = (runs / name / f"checkpoint-{SAVED}" for name in (cell.name, cell.same))
    file = "model.safetensors" if cell.method == "full" else "adapter_model.safetensors"
    assert_close(load_file(ours / file), load_file(theirs / file), tolerance(cell))
    moments, wanted = (torch.load(f / "optimizer.pt", weights_only=True) for f in (ours, theirs))
    assert moments["state"].keys() == wanted["state"].keys()
    for place, state in wanted["state"].items():
        assert_close(moments["state"][place], state, tolerance(cell))
    for key in ("params", "weight_decay", "lr"):
        assert [g[key] for g in moments["param_groups"]] == [g[key] for g in wanted["param_groups"]]


@pytest.mark.parametrize("cell", chosen(RESUMED), ids=lambda c: c.name)
def test_a_checkpoint_resumes_under_its_own_and_other_layouts(runs, cell: Cell):
    split, one = read(runs, cell.name), read(runs, cell.same)
    own = read(runs, f"{cell.name}-resumed")
    assert all(torch.equal(own["state"][name], tensor) for name, tensor in split["state"].items())
    for name in (f"{cell.name}-from-one", f"{cell.name}-to-one"):
        assert_close(read(runs, name)["state"], one["state"], EXACT)
