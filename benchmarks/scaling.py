"""Training on up to 1,024 GPUs, by formula and by simulation: the tables of docs/scaling.md.

    python benchmarks/scaling.py step        # memory and communication of a step, strategy by strategy
    python benchmarks/scaling.py gpus        # how both go with the number of GPUs
    python benchmarks/scaling.py published   # the formulas against published figures
    python benchmarks/scaling.py simulate    # the formulas against what DDP, FSDP2 and tensor parallelism send

`step` and `gpus` take your cluster's numbers: --memory 141e9 --infiniband 100e9 --gpus 256. `simulate` runs real steps
of a small Llama in one process with a fake process group: every collective is issued and counted, but not sent.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from posttrain.distributed.scaling import (
    BLOOM,
    LLAMA3,
    Architecture,
    Cluster,
    Layout,
    Work,
    bubble,
    communication,
    compute_seconds,
    memory,
    model_states,
    ring,
    smallest,
)

RANK = 16
PIPELINE = {"8B": 4, "70B": 8, "405B": 16}
TRAINED = {"in full": Work(), f"LoRA, r = {RANK}": Work(rank=RANK)}
Strategy = Callable[[int], Layout | None]


def strategies(pipeline: int) -> dict[str, Strategy]:
    """The layout on that many GPUs by name; None if they are too few."""

    def hybrid(stage: Any, pipeline: int = 1) -> Strategy:
        def layout(gpus: int) -> Layout | None:
            return Layout(gpus // (8 * pipeline), 8, pipeline, stage) if gpus >= 8 * pipeline else None

        return layout

    return {
        "DDP": lambda n: Layout(n),
        "ZeRO-1": lambda n: Layout(n, stage=1),
        "ZeRO-2": lambda n: Layout(n, stage=2),
        "ZeRO-3, FSDP2": lambda n: Layout(n, stage=3),
        "HSDP, a copy a node": lambda n: Layout(n, stage=3, shard_group=8),
        "TP 8 x DDP": hybrid(0),
        f"TP 8 x PP {pipeline} x DDP": hybrid(0, pipeline),
        f"TP 8 x PP {pipeline} x ZeRO-1": hybrid(1, pipeline),
    }


def step(gpus: int, cluster: Cluster) -> Iterator[str]:
    """A step on `gpus` GPUs."""
    for arch in LLAMA3.values():
        for how, work in TRAINED.items():
            yield from [f"**{arch.name}, {how}**, {gpus:,} GPUs", ""]
            rows = [("", "states", "all", "fits", "fits from GPUs", "sent", "on the wire", "computing", "bubble")]
            for name, layout_of in strategies(PIPELINE[arch.name]).items():
                layout = layout_of(gpus)
                if layout is None:
                    continue
                held, traffic = memory(arch, layout, work), communication(arch, layout, work, cluster)
                idle = bubble(layout.pipeline, work.micro_batches(layout)) if layout.pipeline > 1 else None
                least = smallest(arch, ascending(layout_of), work, cluster)
                rows.append(
                    (name, gb(held.states), gb(held.total), "yes" if held.total <= cluster.memory else "no",
                     f"{least.gpus:,}" if least else "never", gb(sum(t.sent for t in traffic)),
                     seconds(sum(t.seconds for t in traffic)), seconds(compute_seconds(arch, layout, work, cluster)),
                     "" if idle is None else f"{idle:.0%}")
                )  # fmt: skip
            yield from [*markdown(rows), ""]


def by_gpus(cluster: Cluster) -> Iterator[str]:
    """Memory, and communication as a share of computation, from a node to 1,024 GPUs."""
    counts = (8, 32, 128, 512, 1024)
    for arch in LLAMA3.values():
        for how, work in TRAINED.items():
            yield from [f"**{arch.name}, {how}**: GB a GPU, and seconds on the wire for one of computing", ""]
            rows = [("GPUs", *map("{:,}".format, counts))]
            for name, layout_of in strategies(PIPELINE[arch.name]).items():
                cells = []
                for layout in map(layout_of, counts):
                    if layout is None:
                        cells.append("")
                        continue
                    wire = sum(t.seconds for t in communication(arch, layout, work, cluster))
                    share = wire / compute_seconds(arch, layout, work, cluster)
                    held = memory(arch, layout, work).total
                    cells.append(f"{held / 1e9:,.0f}" + (f", {share:.2f}" if held <= cluster.memory else ""))
                rows.append((name, *cells))
            yield from [*markdown(rows), ""]


def ascending(layout_of: Strategy) -> Iterator[Layout]:
    """The layouts on 1, 2, 4, .. 1,024 GPUs."""
    return (layout for n in range(11) if (layout := layout_of(2**n)) is not None)


def published() -> list[str]:
    """Figures published by others, beside ours."""
    rows = [("", "published", "formula", "where")]

    def add(what: str, said: str, got: str, where: str) -> None:
        rows.append((what, said, got, where))

    for name, said in (("8B", "8,030,261,248"), ("70B", "70,553,706,496"), ("405B", "405,853,388,800")):
        add(f"parameters of Llama 3 {name}", said, f"{LLAMA3[name].parameters:,}", "the models' files on the hub")
    add("parameters of BLOOM", "176,247,271,424", f"{BLOOM.parameters:,}", "its model card")
    psi = 7.5e9
    for stage, said in enumerate(("120", "31.4", "16.6", "1.9")):
        got = sum(model_states(psi, psi, stage=stage, ranks=64, lora=False))
        add(f"7.5B on 64 GPUs, ZeRO-{stage}" if stage else "7.5B on 64 GPUs, data parallel", f"{said} GB",
            f"{got / 1e9:.1f} GB", "arXiv 1910.02054, figure 1")  # fmt: skip
    layout, work = Layout(8, 4, 12, 1), Work(2048, 2048, micro_batch=2)
    add("BLOOM: GPUs of TP 4 x PP 12 x DP 8", "384", f"{layout.gpus}", "arXiv 2211.05100, section 3.4")
    add("BLOOM: bf16 weights", "329 GB", f"{2 * BLOOM.parameters / 2**30:.0f} GiB", "the BigScience page")
    add("BLOOM: with the optimizer's states", "2.3 TB", f"{14 * BLOOM.parameters / 2**40:.1f} TiB", "the same")
    add("BLOOM: memory a GPU", "60 GB used", f"{memory(BLOOM, layout, work).total / 1e9:.0f} GB", "the same; see below")
    return markdown(rows)


# Simulation

SMALL = Architecture("small", 2, 1024, 2048, 8, 8, 2048)
LENGTH = 32


def simulate() -> list[str]:
    """Bytes that real steps send per step and GPU, counted and by formula, by number of GPUs."""
    rows = [("", "GPUs", "collectives", "counted", "formula", "ratio")]
    cases: list[tuple[str, Layout]] = [("DDP", Layout(n)) for n in (2, 4, 1024)]
    cases += [("FSDP2", Layout(n, stage=3)) for n in (2, 4, 1024)]
    cases += [("HSDP, 8 share a copy", Layout(n, stage=3, shard_group=8)) for n in (16, 1024)]
    cases += [("TP, as Megatron", Layout(1, n)) for n in (2, 4, 8)]
    cases += [("TP, each matrix on its own", Layout(1, n)) for n in (2, 8)]
    for name, layout in cases:
        calls, counted = count_step(name, layout)
        work = Work(sequences=layout.data, length=LENGTH, checkpointing=False)
        formula = sum(t.sent for t in communication(SMALL, layout, work))
        rows.append((name, f"{layout.gpus:,}", f"{calls}", f"{counted / 1e6:.2f} MB", f"{formula / 1e6:.2f} MB",
                     f"{counted / formula:.3f}"))  # fmt: skip
    return markdown(rows)


def count_step(name: str, layout: Layout) -> tuple[int, float]:
    """(collectives, bytes that rank 0 sends by rings) of one forward and backward pass of a small Llama in bf16."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import LlamaConfig, LlamaForCausalLM

    found: list[float] = []

    def count(kind: Any, size: float, members: int) -> None:
        found.append(ring(kind, size, members))

    class Counting(TorchDispatchMode):
        """Sees c10d's collectives (FSDP2's) and the functional ones (DTensor's), with their tensors."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            op = func.name()
            if op == "c10d::_allgather_base_":
                count("all-gather", args[0].nbytes, args[0].numel() // args[1].numel())
            elif op == "c10d::_reduce_scatter_base_":
                count("reduce-scatter", args[1].nbytes, args[1].numel() // args[0].numel())
            elif op == "c10d::allreduce_":
                count("all-reduce", sum(t.nbytes for t in args[0]), layout.data // layout.sharded_over)
            elif op == "_c10d_functional::all_reduce":
                count("all-reduce", args[0].nbytes, layout.tensor)
            elif "c10d" in op and op.partition("::")[2] not in ("wait_tensor", "_wrap_tensor_autograd"):
                raise RuntimeError(f"a collective that is not counted: {op}")
            return func(*args, **(kwargs or {}))

    dist.init_process_group("fake", rank=0, world_size=layout.gpus, store=FakeStore())
    try:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=SMALL.vocabulary, hidden_size=SMALL.hidden, intermediate_size=SMALL.intermediate,
            num_hidden_layers=SMALL.layers, num_attention_heads=SMALL.heads, num_key_value_heads=SMALL.kv_heads,
            tie_word_embeddings=SMALL.tied, dtype=torch.bfloat16,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
        if name == "DDP":
            model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

            def hook(
                state: None, bucket: dist.GradBucket
            ) -> torch.futures.Future[torch.Tensor]:  # its reducer is C++, below any dispatch
                count("all-reduce", bucket.buffer().nbytes, layout.data)
                done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
                done.set_result(bucket.buffer())
                return done

            model.register_comm_hook(None, hook)
        elif layout.stage == 3:
            _shard(model, layout)
        else:
            _split(model, layout.tensor, together="Megatron" in name)
        ids = torch.zeros((1, LENGTH), dtype=torch.long)
        with Counting():
            model(input_ids=ids, labels=ids).loss.backward()
    finally:
        dist.destroy_process_group()
    return len(found), sum(found)


def _shard(model: Any, layout: Layout) -> None:
    """FSDP2, each layer and the rest. By default it keeps the rest whole until the backward pass; ZeRO-3 does not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    replicas = layout.data // layout.sharded_over
    mesh = (
        init_device_mesh("cpu", (layout.data,))
        if replicas == 1
        else init_device_mesh("cpu", (replicas, layout.sharded_over), mesh_dim_names=("replicate", "shard"))
    )
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _split(model: Any, tensor: int, *, together: bool) -> None:
    """DTensor's column- and row-wise layers; `together`: what goes into a block is one tensor, with one gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    if together:
        whole = Replicate()
        plan["self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": whole}, desired_input_kwarg_layouts={"hidden_states": whole}
        )
        plan["mlp"] = PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,))
    mesh = init_device_mesh("cpu", (tensor,))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)


# Printing


def gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as a Markdown table, its first row the header."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body]


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("step", "gpus", "published", "simulate"))
    parser.add_argument("--gpus", type=int, default=1024)
    for field in dataclasses.fields(Cluster):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args(argv))
    cluster = Cluster(**{field.name: given[field.name] for field in dataclasses.fields(Cluster)})
    lines = {
        "step": lambda: step(given["gpus"], cluster),
        "gpus": lambda: by_gpus(cluster),
        "published": published,
        "simulate": simulate,
    }[given["what"]]()
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    main()
