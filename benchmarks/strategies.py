"""Memory per process and seconds per step of each strategy: `python benchmarks/strategies.py --processes 1 2`.

A Llama with random weights is fully fine-tuned in fp32 with Adam, through accelerate with our configurations. Memory is
that of live tensors, each storage counted once and by owner; not RSS, which does not shrink when memory is freed:

    parameters     weights, or this process's share
    gradients      their peak during the backward pass, DeepSpeed's buffers for them included
    optimizer      Adam's two moments, and DeepSpeed's own fp32 copy of the trained parameters
    activations    what the forward pass keeps for the backward pass (saved tensors that are no parameters)
    other          every other live tensor after the backward pass, with the attribute of DeepSpeed's that owns it

The formula is that of Rajbhandari et al. (arXiv 1910.02054, section 5), for fp32. Bytes per parameter: 4 of weights, 4
of gradients, 8 of moments, and 4 of DeepSpeed's copy; each divided by the number of processes from the stage on that
shards it. On CPUs there is only one memory, so offloading shows no difference. Exits with 1 if memory does not fall in
the order of stages 0 > 1 > 2 > 3.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIGS = {  # by name in the table
    "ZeRO 0 (DDP)": "ddp", "ZeRO 1": "zero1", "ZeRO 2": "zero2", "ZeRO 2 + offload": "zero2_offload", "ZeRO 3": "zero3",
    "ZeRO 3 + offload": "zero3_offload", "FSDP2": "fsdp2", "Tensor": "tensor_parallel", "Pipeline": "pipeline",
}  # fmt: skip
SPLIT = ("tensor_parallel", "pipeline")  # one model over all processes
MIB = 2**20
KINDS = ("parameters", "gradients", "optimizer", "activations", "other")
# DeepSpeed's attributes of gradients, and of the copy that it steps (0.19).
GRADIENTS = (
    "averaged_gradients", "grad_partitions_flat_buffer", "ipg_buckets", "offload_gradient_dict",
    "temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
)  # fmt: skip
COPIES = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")


def formula(config: str, parameters: int, processes: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer that a process should hold."""
    stage = {"ddp": 0, "fsdp2": 3}.get(config, int(config[4]) if config.startswith("zero") else 0)
    copy = 4 if config.startswith("zero") else 0
    share = {True: 1 / processes, False: 1.0}
    if config in SPLIT:
        stage = 3
    return {
        "parameters": 4 * parameters * share[stage >= 3],
        "gradients": 4 * parameters * share[stage >= 2],
        "optimizer": (8 + copy) * parameters * share[stage >= 1],
    }


# In each process


def tensors_in(thing: Any, depth: int = 5) -> Iterator[Any]:
    """The tensors in lists and mappings of lists, and one level of objects."""
    import torch

    if isinstance(thing, torch.Tensor):
        yield thing
    elif depth and isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_in(value, depth - 1)
    elif depth and isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from tensors_in(value, depth - 1)
    elif depth and type(thing).__module__.startswith("deepspeed") and hasattr(thing, "__dict__"):
        for value in list(vars(thing).values()):
            yield from tensors_in(value, 1)


class Ledger:
    """Each live storage once, under its first owner; those in `before` are not counted."""

    def __init__(self, before: set[int]) -> None:
        self.seen = set(before)
        self.bytes: dict[str, int] = defaultdict(int)

    def claim(self, kind: str, tensors: Any) -> None:
        for tensor in tensors:
            for storage in storages(tensor):
                if storage.data_ptr() not in self.seen:
                    self.seen.add(storage.data_ptr())
                    self.bytes[kind] += storage.nbytes()


def storages(tensor: Any) -> Iterator[Any]:
    """The storages of a tensor, or of this process's shard of it."""
    if tensor is None:
        return
    for held in (getattr(tensor, "_local_tensor", tensor), getattr(tensor, "ds_tensor", None)):
        if held is not None and held.device.type != "meta" and held.untyped_storage().data_ptr():
            yield held.untyped_storage()


def live() -> list[Any]:
    import torch

    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]


class Gradients:
    """The peak bytes of gradients during a backward pass, by owner."""

    def __init__(self, model: Any, optimizer: Any, before: set[int]) -> None:
        self.parameters, self.optimizer, self.before = list(model.parameters()), optimizer, before
        self.peak: dict[str, int] = {}
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda _: self.look()) for p in self.parameters if p.requires_grad
        ]

    def look(self) -> None:
        ledger = Ledger(self.before)
        ledger.claim("parameters", self.parameters)
        ledger.claim("gradients: grad", [p.grad for p in self.parameters])
        owned = vars(getattr(self.optimizer, "optimizer", self.optimizer))
        for name in GRADIENTS:
            ledger.claim(f"gradients: {name}", tensors_in(owned.get(name)))
        found = {name: size for name, size in ledger.bytes.items() if name.startswith("gradients")}
        if sum(found.values()) > sum(self.peak.values()):
            self.peak = found

    def done(self) -> dict[str, int]:
        self.look()
        for hook in self.hooks:
            hook.remove()
        return self.peak


def count(model: Any, optimizer: Any, before: set[int]) -> dict[str, int]:
    """Bytes by owner between backward pass and optimizer step, without gradients."""
    ledger = Ledger(before)
    parameters = list(model.parameters())
    ledger.claim("parameters", parameters)
    ledger.claim("gradients", [p.grad for p in parameters])
    wrapper = getattr(optimizer, "optimizer", optimizer)  # in accelerate's: torch's, or DeepSpeed's around torch's
    owned = vars(wrapper)
    for name in GRADIENTS:
        ledger.claim("gradients", tensors_in(owned.get(name)))
    for name in COPIES:
        ledger.claim("optimizer", tensors_in(owned.get(name)))
    for state in getattr(wrapper, "optimizer", wrapper).state.values():
        ledger.claim("optimizer", tensors_in(dict(state)))
    for name, value in list(owned.items()):
        ledger.claim(f"other: {name}", tensors_in(value))
    ledger.claim("other: live", live())
    return {name: size for name, size in ledger.bytes.items() if name != "gradients"}


class Saved:
    """Bytes that a forward pass saves for its backward pass, without parameters."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen, self.bytes = model, set(), 0

    def __enter__(self) -> "Saved":
        import torch

        self.seen = {p.untyped_storage().data_ptr() for p in self.model.parameters() if not hasattr(p, "_local_tensor")}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def pack(self, tensor: Any) -> Any:
        import torch

        if not isinstance(tensor, torch.nn.Parameter) and tensor.device.type != "meta":
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            if storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
        return tensor

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


def llama(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32, num_key_value_heads=args.hidden // 32, vocab_size=args.vocab,
        max_position_embeddings=args.tokens, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip


def measure(config: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps under a configuration, in the processes of this launch."""
    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from transformers import LlamaForCausalLM

    from posttrain.distributed.deepspeed import disable_zero3_init
    from posttrain.upstream.accelerate import follow_fsdp_on_cpu

    cuda = torch.cuda.is_available()
    AcceleratorState._reset_state(reset_partial_state=True)
    disable_zero3_init()
    # As a recipe's arguments have it: with cpu=True accelerate would leave DeepSpeed out.
    PartialState(cpu=not cuda and not config.startswith("zero"), backend=None if cuda else "gloo")
    if config == "fsdp2":
        follow_fsdp_on_cpu()
    accelerator = Accelerator(cpu=not cuda and not config.startswith("zero"))
    gc.collect()
    before = {storage.data_ptr() for tensor in live() for storage in storages(tensor)}  # of the strategy before
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(args))
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if config.startswith("zero"):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings |= {
            "train_micro_batch_size_per_gpu": args.rows, "train_batch_size": args.rows * accelerator.num_processes,
            "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        }  # fmt: skip
        # A model this small would stay whole, and a bucket be larger than all of it.
        settings["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0, "reduce_bucket_size": args.hidden * args.hidden,
            "stage3_prefetch_bucket_size": args.hidden * args.hidden, "stage3_max_live_parameters": 0,
        }  # fmt: skip
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.randint(args.vocab, (args.rows, args.tokens), device=accelerator.device)
    seconds, held = [], {}
    for step in range(args.steps):
        counted = step == 1  # the moments are there
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        if counted:
            gradients = Gradients(model, optimizer, before)
            with Saved(model) as saved:
                loss = model(input_ids=ids, labels=ids).loss
        else:
            loss = model(input_ids=ids, labels=ids).loss
        if config.startswith("zero"):
            model.backward(loss)
        else:
            accelerator.backward(loss)
        del loss
        if counted:
            gc.collect()
            held = {**count(model, optimizer, before), **gradients.done(), "activations": saved.bytes}
        if config.startswith("zero"):
            model.step()
        else:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        if step >= 2:
            seconds.append(time.perf_counter() - begun)
    if hasattr(model, "destroy"):
        model.destroy()
    return {"parameters": parameters, "held": held, "step_s": statistics.median(seconds)}


def measure_split(config: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps of one model that is split over all processes of this launch, by tensor or by pipeline.

    The embeddings are tied: the first stage has them, the last a copy. Activations are those of all micro-batches.
    """
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from transformers import LlamaForCausalLM

    from posttrain.distributed.split import gradients as gradients_of
    from posttrain.distributed.split.layout import Layout
    from posttrain.distributed.split.mesh import Mesh
    from posttrain.distributed.split.partition import Cut
    from posttrain.distributed.split.pipeline import Pipeline
    from posttrain.distributed.split.tensor import shard

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    gc.collect()
    before = {storage.data_ptr() for tensor in live() for storage in storages(tensor)}
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(args)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    processes, staged = dist.get_world_size(), config == "pipeline"
    mesh = Mesh(Layout(1, processes if staged else 1, 1 if staged else processes, "1f1b", args.rows), device)
    cut = Cut(model, mesh) if staged else shard(model, mesh.devices["tensor"])
    pipeline = Pipeline(model, mesh, autocast=nullcontext) if staged else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(args.vocab, (args.rows, args.tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def score(k: int, hidden: Any) -> Any:
        logits = model(inputs_embeds=hidden).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[k : k + 1, 1:].flatten()) / args.rows

    seconds, held = [], {}
    for step in range(args.steps):
        begun = time.perf_counter()
        counted = step == 1
        if counted:
            found = Gradients(model, optimizer, before)
        with Saved(model) if counted else nullcontext() as saved:
            if pipeline is None:
                loss = model(input_ids=ids, labels=ids).loss
            else:
                pipeline.run(batch, args.rows, score, train=True)
        if pipeline is None:
            loss.backward()
            del loss
        gradients_of.reduce(model, mesh)
        if counted:
            gc.collect()
            held = {**count(model, optimizer, before), **found.done(), "activations": saved.bytes}
        gradients_of.clip(model, mesh, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= 2:
            seconds.append(time.perf_counter() - begun)
    del cut
    return {"parameters": parameters, "held": held, "step_s": statistics.median(seconds)}


def work(args: argparse.Namespace) -> None:
    """One process of a launch: every configuration in turn; rank 0 writes what it saw."""
    from unittest import mock

    import torch
    import torch.distributed as dist

    from posttrain.distributed import deepspeed_build as extensions
    from posttrain.distributed import rendezvous
    from posttrain.launch import accelerate_environment

    extensions.use()
    rendezvous.start_process_group(300, on_cpu=not torch.cuda.is_available())
    found = {}
    for config in args.configs:
        made = accelerate_environment(ROOT / "accelerate_configs" / f"{config}.yaml")
        made = {key: value for key, value in made.items() if value != "auto"}  # a Trainer fills these in
        with mock.patch.dict(os.environ, made):
            split = config in SPLIT and int(os.environ["WORLD_SIZE"]) > 1
            found[config] = measure_split(config, args) if split else measure(config, args)
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
    if os.environ["RANK"] == "0":
        args.out.write_text(json.dumps(found), encoding="utf-8")


# The table


def start(args: argparse.Namespace, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, __file__,
            "--out", out, *[word for name in ("hidden", "layers", "vocab", "rows", "tokens", "steps")
                            for word in (f"--{name}", getattr(args, name))],
            "--configs", *args.configs,
        ]  # fmt: skip
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        env = {"OMP_NUM_THREADS": str(threads), **os.environ}
        subprocess.run([str(word) for word in command], check=True, env=env, stdout=sys.stderr)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def grouped(held: dict[str, int]) -> dict[str, int]:
    return {kind: sum(size for name, size in held.items() if name.partition(":")[0] == kind) for kind in KINDS}


def report(args: argparse.Namespace, results: dict[int, dict[str, Any]]) -> bool:
    """Print the table; return whether each stage holds less than the one before it."""
    names = {config: name for name, config in CONFIGS.items()}
    size = next(iter(next(iter(results.values())).values()))["parameters"]
    print(f"{size:,} parameters, fp32, {args.rows} rows of {args.tokens} tokens per process; MiB on rank 0\n")
    print("| strategy | processes | parameters | gradients | optimizer | activations | other | formula | s per step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for processes, found in results.items():
        for config, one in found.items():
            kinds = grouped(one["held"])
            states = sum(kinds[kind] for kind in KINDS[:3])
            wanted = sum(formula(config, one["parameters"], processes).values())
            cells = [f"{kinds[kind] / MIB:.1f}" for kind in KINDS]
            off = f"{wanted / MIB:.1f} ({states / wanted - 1:+.1%})"
            print(f"| {names[config]} | {processes} | {' | '.join(cells)} | {off} | {one['step_s']:.3f} |")
    print("\nBy owner, above 0.1 MiB:")
    for processes, found in results.items():
        for config, one in found.items():
            parts = [(n.replace(": ", " "), v) for n, v in one["held"].items() if ":" in n and v > MIB // 10]
            shown = ", ".join(f"{name} {v / MIB:.1f}" for name, v in sorted(parts, key=lambda part: -part[1]))
            print(f"- {names[config]}, {processes}: {shown}")
    holds = True
    for processes, found in results.items():
        stages = [c for c in ("ddp", "zero1", "zero2", "zero3") if c in found]
        held = [sum(grouped(found[c]["held"])[kind] for kind in KINDS[:3]) for c in stages]
        falls = all(a > b for a, b in pairwise(held))
        if processes > 1:
            holds &= falls
            print(f"\nOrder {' > '.join(stages)} on {processes} processes: {'holds' if falls else 'DOES NOT HOLD'}")
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS.values()), choices=list(CONFIGS.values()))
    for name, default in (("hidden", 256), ("layers", 4), ("vocab", 4096), ("rows", 4), ("tokens", 64), ("steps", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        work(args)
    elif not report(args, {processes: start(args, processes) for processes in args.processes}):
        sys.exit(1)


if __name__ == "__main__":
    main()
