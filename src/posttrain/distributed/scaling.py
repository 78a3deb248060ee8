"""Memory and communication of a training step on up to thousands of GPUs, by formula.

For an architecture, a layout (data x pipeline x tensor parallel, with a ZeRO stage) and a batch: the memory of the
fullest GPU, the bytes that it sends per step and how long that takes at a link's bandwidth, and the pipeline's bubble.

Sources: ZeRO (Rajbhandari et al., 2020, arXiv 1910.02054); tensor parallelism (Shoeybi et al., 2019, arXiv 1909.08053);
pipelines, their bubble, and volumes (Narayanan et al., 2021, arXiv 2104.04473); activations and checkpointing
(Korthikanti et al., 2022, arXiv 2205.05198), with its count redone for SwiGLU, grouped queries and flash attention.

Left out: latency, overlap of communication with computation, DDP's buckets, fragmentation, the CUDA context (about half
a GB), offload, sequence parallelism, interleaved schedules, 4-bit bases. Imports no torch. All sizes are in bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

HALF, SINGLE = 2, 4  # bytes of bf16 and of fp32
ADAM = 12  # bytes of AdamW per trained parameter: an fp32 master and two moments (ZeRO, section 3.1)


@dataclass(frozen=True)
class Architecture:
    """A decoder. `gated`: SwiGLU, three matrices, no biases (Llama); else two matrices and biases (GPT, BLOOM)."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    def matrices(self) -> list[tuple[int, int, Literal["column", "row"]]]:
        """(inputs, outputs, how tensor parallelism splits it) of one layer's linear layers."""
        h, f, kv = self.hidden, self.intermediate, self.hidden * self.kv_heads // self.heads
        attention: list[tuple[int, int, Literal["column", "row"]]] = [
            (h, h, "column"), (h, kv, "column"), (h, kv, "column"), (h, h, "row"),
        ]  # fmt: skip
        return [*attention, *[(h, f, "column")] * (2 if self.gated else 1), (f, h, "row")]  # type: ignore[list-item]

    def layer_parameters(self, tensor: int = 1) -> float:
        """Parameters of one layer on one of `tensor` ranks: matrices are split, norms are not, biases like their
        outputs."""
        split = sum(i * o for i, o, _ in self.matrices()) / tensor
        if self.gated:
            return split + 2 * self.hidden
        biases = sum(o / tensor if how == "column" else o for _, o, how in self.matrices())
        return split + biases + 4 * self.hidden  # norms with biases

    def embedding_parameters(self, tensor: int = 1) -> float:
        return self.vocabulary * self.hidden / tensor

    @property
    def parameters(self) -> int:
        norms = self.hidden if self.gated else 4 * self.hidden  # BLOOM has one behind its embedding, too
        return round(
            self.layers * self.layer_parameters() + (1 if self.tied else 2) * self.embedding_parameters() + norms
        )

    def adapter_parameters(self, r: int, tensor: int = 1) -> float:
        """Parameters of LoRA on the linear layers of one layer: B is split with a column-wise base, A with a row-wise
        one."""
        return sum(r * (i + o / tensor) if how == "column" else r * (i / tensor + o) for i, o, how in self.matrices())

    def activation_bytes(self, tensor: int = 1) -> float:
        """Bytes of bf16 activations per layer and token that are kept for the backward pass, without extra copies.

        Not split over ranks: the inputs of the norms and of the projections after them (4h). Split: queries, keys,
        values, attention output and its log-sum-exp (flash attention keeps no score matrix); of a gated feed-forward
        block the gate, its activation, the other half and their product (4f), else input and output of its activation
        (2f).
        """
        kv = self.hidden * self.kv_heads // self.heads
        split = HALF * (2 * self.hidden + 2 * kv + (4 if self.gated else 2) * self.intermediate) + SINGLE * self.heads
        return HALF * 4 * self.hidden + split / tensor


LLAMA3 = {
    "8B": Architecture("8B", 32, 4096, 14336, 32, 8, 128256),
    "70B": Architecture("70B", 80, 8192, 28672, 64, 8, 128256),
    "405B": Architecture("405B", 126, 16384, 53248, 128, 8, 128256),
}

BLOOM = Architecture("BLOOM-176B", 70, 14336, 57344, 112, 112, 250880, gated=False, tied=True)


@dataclass(frozen=True)
class Layout:
    """How a model is laid out on data x pipeline x tensor GPUs.

    stage: ZeRO's stage, over the data-parallel ranks. 0 is DDP; 3 is also FSDP2's full sharding.
    shard_group: ranks that share one copy, with replicas beside them (HSDP); None: all ranks share one copy.
    """

    data: int
    tensor: int = 1
    pipeline: int = 1
    stage: Literal[0, 1, 2, 3] = 0
    shard_group: int | None = None

    @property
    def gpus(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def sharded_over(self) -> int:
        return min(self.data, self.shard_group or self.data)


@dataclass(frozen=True)
class Work:
    """One step: `sequences` of `length` tokens over all GPUs, `micro_batch` of them at a time on each.

    rank: LoRA's, on every linear layer, with adapters in fp32 on a frozen bf16 base; None: every parameter is trained.
    checkpointing: only the input of each layer is kept, and the layer is recomputed in the backward pass.
    """

    sequences: int = 1024
    length: int = 4096
    micro_batch: int = 1
    rank: int | None = None
    checkpointing: bool = True

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches per pipeline and step; 0 if there are fewer sequences than data-parallel ranks need."""
        return self.sequences // (layout.data * self.micro_batch)


@dataclass(frozen=True)
class Cluster:
    """Bandwidths in bytes/s per GPU, in one direction; `flops` is what a GPU sustains, not its peak.

    The defaults are those of H100 nodes: NVLink 4, one NDR InfiniBand card per GPU, 40% of 989 TFLOP/s in bf16.
    """

    gpus_per_node: int = 8
    memory: float = 80e9
    nvlink: float = 450e9
    infiniband: float = 50e9
    flops: float = 0.4 * 989e12

    def bandwidth(self, members: int, stride: int) -> float:
        """Bandwidth per member of a ring through `members` GPUs that are `stride` ranks apart.

        A ring enters each node once, and NCCL spreads its traffic over the network cards of all members in that node:
        each member's bytes leave by that many cards.
        """
        in_node = max(1, min(members, self.gpus_per_node // stride))
        if members <= in_node:
            return self.nvlink
        return min(self.nvlink, in_node * self.infiniband)


# Memory


@dataclass(frozen=True)
class Part:
    """One pipeline stage: its layers, its embedding matrices, and the micro-batches that await their backward pass."""

    layers: int
    embeddings: int
    in_flight: int
    has_head: bool

    def parameters(self, arch: Architecture, tensor: int) -> float:
        norm = arch.hidden if self.has_head else 0
        return self.layers * arch.layer_parameters(tensor) + self.embeddings * arch.embedding_parameters(tensor) + norm

    def trained(self, arch: Architecture, work: Work, tensor: int) -> float:
        if work.rank is None:
            return self.parameters(arch, tensor)
        return self.layers * arch.adapter_parameters(work.rank, tensor)


def parts(arch: Architecture, layout: Layout, work: Work) -> list[Part]:
    """The pipeline's first stage, a middle one and the last, with layers distributed so that the fullest is smallest.

    The first holds the embedding, the last the head (a tied one is a copy). Under 1F1B stage i of p has p - i
    micro-batches in flight (2104.04473, section 2.2).
    """
    p = layout.pipeline
    if p == 1:
        return [Part(arch.layers, 1 if arch.tied else 2, 1, True)]
    weight = arch.embedding_parameters() / arch.layer_parameters()

    def fullest(at_ends: int) -> float:
        return max(at_ends + weight, middle_of(at_ends))

    def middle_of(at_ends: int) -> int:
        left = arch.layers - 2 * at_ends
        return -(-left // (p - 2)) if p > 2 else 0

    candidates = range(1, arch.layers // 2 + 1) if p > 2 else [-(-arch.layers // 2)]
    ends = min(candidates, key=fullest)
    micro = max(1, work.micro_batches(layout))
    found = [Part(ends, 1, min(p, micro), False), Part(ends, 1, 1, True)]
    return found if p == 2 else [found[0], Part(middle_of(ends), 0, min(p - 1, micro), False), found[1]]


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `gathered`: weights that stage 3 gathers temporarily, of one layer and the next."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.states + self.gathered + self.activations


def model_states(
    parameters: float, trained: float, *, stage: int, ranks: int, lora: bool
) -> tuple[float, float, float]:
    """Bytes of (weights, gradients, optimizer) on one of `ranks`, for `parameters` of which `trained` are trained.

    ZeRO, section 5: stage 1 splits the optimizer's states, 2 also the gradients, 3 also the weights. In full
    fine-tuning a parameter takes 2 + 2 + 12 bytes; in an fp32 adapter, which needs no master, 4 + 4 + 8. A frozen
    weight takes 2, which stages 1 and 2 do not split.
    """
    own = SINGLE if lora else HALF
    frozen = parameters if lora else 0
    over = [ranks if stage >= least else 1 for least in (3, 2, 1)]
    weights = (HALF * frozen + own * trained) / over[0]
    return weights, own * trained / over[1], (ADAM - (SINGLE if lora else 0)) * trained / over[2]


def memory(arch: Architecture, layout: Layout, work: Work) -> Memory:
    """Memory of the fullest GPU."""
    return max((_memory(part, arch, layout, work) for part in parts(arch, layout, work)), key=lambda m: m.total)


def _memory(part: Part, arch: Architecture, layout: Layout, work: Work) -> Memory:
    t, lora = layout.tensor, work.rank is not None
    states = model_states(
        part.parameters(arch, t), part.trained(arch, work, t), stage=layout.stage, ranks=layout.sharded_over, lora=lora
    )
    gathered = 0.0
    if layout.stage == 3 and layout.data > 1:
        gathered = 2 * HALF * max(arch.layer_parameters(t), part.embeddings and arch.embedding_parameters(t))
    tokens = work.micro_batch * work.length
    kept, whole = HALF * arch.hidden, arch.activation_bytes(t)
    layers = part.in_flight * part.layers * kept + whole if work.checkpointing else part.in_flight * part.layers * whole
    logits = (HALF + SINGLE) * arch.vocabulary / t if part.has_head else 0  # in bf16, and in fp32 for the loss
    return Memory(*states, gathered, tokens * (layers + logits))


# Communication


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends per step for one purpose, and how long that takes at the link's bandwidth."""

    purpose: str
    sent: float
    seconds: float


def ring(kind: Literal["all-reduce", "all-gather", "reduce-scatter"], size: float, members: int) -> float:
    """Bytes that each of `members` sends for a ring collective over `size` bytes (of the full tensor, not a shard)."""
    return (2 if kind == "all-reduce" else 1) * size * (members - 1) / members


def communication(arch: Architecture, layout: Layout, work: Work, cluster: Cluster = Cluster()) -> list[Traffic]:
    """What a GPU of the fullest stage sends per step. Ranks run through tensor first, then data, then pipeline."""
    t, d, p = layout.tensor, layout.data, layout.pipeline
    micro = work.micro_batches(layout)
    part = max(parts(arch, layout, work), key=lambda part: part.parameters(arch, t))
    lora = work.rank is not None
    trained, whole = part.trained(arch, work, t), part.parameters(arch, t)
    own = SINGLE if lora else HALF
    gradients = own * trained
    weights = HALF * whole + (own * trained if lora else 0)
    found: list[Traffic] = []

    def add(purpose: str, sent: float, members: int, stride: int) -> None:
        if sent:
            found.append(Traffic(purpose, sent, sent / cluster.bandwidth(members, stride)))

    # Data parallel: twice the parameters per step, three times under stage 3 (ZeRO, section 7). Stage 3 gathers, and
    # stages 2 and 3 reduce, once per micro-batch.
    s = layout.sharded_over
    if d > 1 and layout.stage == 0:
        add("gradients", ring("all-reduce", gradients, d), d, t)
    if d > 1 and layout.stage in (1, 2):
        add("gradients", ring("reduce-scatter", gradients, d) * (micro if layout.stage == 2 else 1), d, t)
        add("weights", ring("all-gather", own * trained, d), d, t)
    if d > 1 and layout.stage == 3:
        add("weights", 2 * micro * ring("all-gather", weights, s), s, t)
        add("gradients", micro * ring("reduce-scatter", gradients, s), s, t)
        if s < d:
            add("replicas", micro * ring("all-reduce", gradients / s, d // s), d // s, t * s)

    # Tensor parallel: two all-reduces per layer forward and two backward (1909.08053, section 3), and two more where
    # the layer is recomputed.
    message = HALF * work.micro_batch * work.length * arch.hidden
    if t > 1:
        passes = 3 if work.checkpointing else 2
        add("activations", micro * part.layers * 2 * passes * ring("all-reduce", message, t), t, 1)
    # Pipeline: what one stage hands on, forward and backward (2104.04473, section 3.2); each tensor rank sends it.
    if p > 1:
        add("stages", micro * 2 * message, 2, t * d)
    return found


def bubble(pipeline: int, micro_batches: int) -> float:
    """A pipeline's idle time divided by its working time: (p - 1) / m (2104.04473, section 2.2.1)."""
    return (pipeline - 1) / micro_batches


def compute_seconds(arch: Architecture, layout: Layout, work: Work, cluster: Cluster = Cluster()) -> float:
    """Seconds of computation per step, without bubble. Operations per parameter and token: 2 forward, 2 for the
    gradient of inputs, 2 for that of weights in full fine-tuning, 2 for recomputation. Attention scores are left out.
    """
    passes = 2 + (work.rank is None) + work.checkpointing
    return 2 * passes * arch.parameters * work.sequences * work.length / layout.gpus / cluster.flops


def smallest(arch: Architecture, layouts: Iterator[Layout], work: Work, cluster: Cluster = Cluster()) -> Layout | None:
    """The first of ascending layouts that fits into the GPUs' memory; None if none does."""
    return next((layout for layout in layouts if memory(arch, layout, work).total <= cluster.memory), None)
