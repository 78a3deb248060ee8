"""Every file of accelerate_configs/ for two processes, with every trainer, LoRA and full: equal to one process.

One start of two processes runs all cells (cells.py), one pytest process the reference of each trainer.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from conftest import ROOT, SENTENCES, WORDS, make_tiny_bert, make_tiny_model, write_conll, write_jsonl
from distributed.cells import ADAPTERS, CELLS, CONFIGS, REFUSED, TRAINERS, WRAPPERS, launched_as, run_cell
from posttrain.launch import environment

pytestmark = pytest.mark.distributed

KIND = {"lora": ("adapter", "adapter_model.safetensors"), "none": ("model", "model.safetensors")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_tiny_model(folder / "tiny")
    make_tiny_bert(folder / "bert")
    write_jsonl(folder / "train.jsonl", [{"prompt": f"{w[1:]} ->", "completion": f" {w}"} for w in WORDS])
    rows = [{"prompt": f"{w[1:]} ->", "chosen": f" {w}", "rejected": f" {w[::-1]}"} for w in WORDS]
    write_jsonl(folder / "pairs.jsonl", rows)
    write_conll(folder / "train.conll", SENTENCES * 2)  # whole steps: an epoch's last one is shared out in another way
    return folder


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """The folder of all runs: CONFIG-TRAINER-ADAPTER by two processes, one-TRAINER-ADAPTER by this one."""
    out, config = tmp_path_factory.mktemp("runs"), ROOT / "accelerate_configs" / "ddp.yaml"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        Path(__file__).with_name("cells.py"),
    ]
    with (out / "log").open("w") as log:
        two = subprocess.Popen([*map(str, [*command, files, out])], stdout=log, stderr=log, env=environment(config))
        try:
            for trainer in TRAINERS:
                for adapter in ADAPTERS:
                    folder = out / f"one-{trainer}-{adapter}"
                    folder.mkdir()
                    run_cell(trainer, adapter, files, folder, 1)
            assert two.wait(timeout=1500) == 0, (out / "log").read_text()[-3000:]
        finally:
            two.kill()
    return out


def seen(runs, cell):
    both = [json.loads((runs / "-".join(cell) / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert not any("error" in s for s in both), both
    return both[0]


def tensors(run: Path, adapter: str):
    return load_file(run / Path(*KIND[adapter]))


def distance(a: Path, b: Path, adapter: str) -> float:
    x, y = tensors(a, adapter), tensors(b, adapter)
    assert x.keys() == y.keys() and x
    return max((x[n].float() - y[n].float()).abs().max().item() for n in x)


def logged(run: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def test_the_sweep_covers_every_configuration_and_trainer():
    """Seven files, five trainers, LoRA and full, without refused ones; no file for several processes is left out."""
    assert len(CELLS) == len(set(CELLS)) == 7 * 5 * 2 - 2
    several = {
        file.stem
        for file in (ROOT / "accelerate_configs").glob("*.yaml")
        if yaml.safe_load(file.read_text())["num_processes"] > 1
    }
    # multinode.yaml is ddp.yaml over two launchers: test_failures.py starts both.
    assert several - {"multinode"} - PARALLEL == set(CONFIGS)


PARALLEL = {"tensor_parallel", "pipeline", "hybrid_2d", "hybrid_3d"}  # these have a sweep of their own


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_two_processes_train_as_one(runs, cell):
    config, trainer, adapter = cell
    was = seen(runs, cell)
    assert was["launch"].startswith(f"{config.partition('_')[0]} on 2 processes")
    assert WRAPPERS.get(config, "DeepSpeedEngine") in was["wrapper"]
    assert was["held"] == pytest.approx(0.5 if config.startswith(("zero3", "fsdp2")) else 1, abs=0.02)
    two, one = runs / "-".join(cell) / "whole", runs / f"one-{trainer}-{adapter}" / "whole"
    assert distance(two, one, adapter) < 1e-5
    losses = {run: logged(run, "train/loss") for run in (one, two)}
    assert losses[one].keys() == {1, 2, 3}
    assert losses[two] == pytest.approx(losses[one], abs=2e-5)


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_resumed_run_equals_the_uninterrupted_one(runs, cell):
    """To the last bit; with an offloaded optimizer to the last but one.

    DeepSpeed's cpu_adam multiplies the powers of beta up step by step, and takes them by `pow` when it begins anew
    (csrc/includes/cpu_adam.h, IncrementStep).
    """
    seen(runs, cell)
    away = distance(runs / "-".join(cell) / "resumed", runs / "-".join(cell) / "whole", cell[2])
    assert away <= (1e-6 if cell[0].endswith("offload") else 0)
    log = logged(runs / "-".join(cell) / "resumed", "train/loss")
    assert log.keys() == {3}, "it began at step 2"


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_saved_files_load_without_the_strategy(runs, cell):
    """Complete safetensors files, loaded in a process without the strategy."""
    from posttrain.adapters import load_policy
    from posttrain.config.sections import ModelSettings
    from posttrain.models.loading import load_tokenizer
    from posttrain.models.scoring import score
    from posttrain.ner.alignment import probe_logits
    from posttrain.training.gates import probe_logprobs

    _, trainer, adapter = cell
    seen(runs, cell)
    run = runs / "-".join(cell) / "whole"
    lineage = json.loads((run / "lineage.json").read_text())
    assert lineage["world_size"] == 2
    assert not list(run.glob("**/*.pt")) and not list(run.glob("**/*.bin"))
    model, probe = load_policy(run), lineage["metrics"]["probe"]
    if trainer == "reward":
        tokenizer = load_tokenizer(str(run / KIND[adapter][0]), ModelSettings())
        assert score(model, tokenizer, probe["input_ids"]) == pytest.approx(probe["scores"], abs=1e-4)
    elif trainer == "ner":
        assert probe_logits(model, probe["input_ids"]) == pytest.approx(probe["logits"], abs=1e-4)
    else:
        assert probe_logprobs(model, probe["input_ids"]) == pytest.approx(probe["logprobs"], abs=1e-4)


@pytest.mark.parametrize(("trainer", "adapter"), [(t, a) for t in TRAINERS for a in ADAPTERS])
def test_training_changed_the_weights(runs, files, trainer, adapter):
    """Otherwise the comparisons above would also pass for models that never trained."""
    one = runs / f"one-{trainer}-{adapter}"
    trained = tensors(one / "whole", adapter)
    if adapter == "lora":
        assert max(t.abs().max().item() for n, t in trained.items() if "lora_B" in n) > 1e-3
        return
    base = load_file(files / ("bert" if trainer == "ner" else "tiny") / "model.safetensors")
    moved = [
        (tensor - base[known]).abs().max().item()
        for name, tensor in trained.items()
        for known in (name, name.partition(".")[2])
        if known in base
    ]
    assert moved and max(moved) > 1e-3


@pytest.mark.parametrize("cell", sorted(REFUSED), ids="-".join)
def test_ppo_under_fsdp2_is_refused(cell):
    """PPO under FSDP2: its checkpoints do not gather what is split. Before anything is loaded."""
    from posttrain.distributed.environment import check_launch
    from posttrain.errors import LaunchError

    with launched_as(cell[0]), pytest.raises(LaunchError, match="FSDP"):
        check_launch(cell[1])
