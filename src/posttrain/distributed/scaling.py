"""Memory and communication of a training step on up to thousands of GPUs, by formula.

For an architecture, a layout (data x pipeline x tensor parallel, with a ZeRO stage) and a batch: what the fullest GPU
holds, how many bytes it sends a step and how long that takes at a link's bandwidth, and the pipeline's bubble.

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
ADAM = 12  # of AdamW a trained parameter: an fp32 master and two moments (ZeRO, section 3.1)


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
        """Of one layer on one of `tensor` ranks: matrices are split, norms are not, biases go with their outputs."""
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
        """Of LoRA on every linear layer of one layer: B follows a column-wise base, A a row-wise one."""
        return sum(r * (i + o / tensor) if how == "column" else r * (i / tensor + o) for i, o, how in self.matrices())

    def activation_bytes(self, tensor: int = 1) -> float:
        """Of one layer and one token, in bf16, kept for the backward pass by kernels that keep no copies.

        Whole on each rank: the input of each norm, and of what follows it (4h). Split: queries, keys and values, the
        attention's output, its log-sum-exp (flash attention keeps no matrix of scores); of a gated feed-forward the
        gate, its activation, the other half, and their product (4f), else the two sides of its activation (2f).
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

    stage: ZeRO's, over the data-parallel ranks. 0 is DDP; 3 is FSDP2's full sharding, too.
    shard_group: ranks that share one copy, with replicas beside them (HSDP); None: all of them share one.
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

    rank: of LoRA on every linear layer, its adapters in fp32 on a frozen bf16 base; None: every parameter is trained.
    checkpointing: only the input of each layer is kept, and the layer computed again in the backward pass.
    """

    sequences: int = 1024
    length: int = 4096
    micro_batch: int = 1
    rank: int | None = None
    checkpointing: bool = True

    def micro_batches(self, layout: Layout) -> int:
        """Of one pipeline in one step; 0 where there is not one for each data-parallel rank."""
        return self.sequences // (layout.data * self.micro_batch)


@dataclass(frozen=True)
class Cluster:
    """Bandwidths in bytes/s, in one direction, of one GPU; `flops` is what a GPU sustains, not its peak.

    The defaults are those of H100 nodes: NVLink 4, one NDR InfiniBand card a GPU, 40% of 989 TFLOP/s in bf16.
    """

    gpus_a_node: int = 8
    memory: float = 80e9
    nvlink: float = 450e9
    infiniband: float = 50e9
    flops: float = 0.4 * 989e12

    def bandwidth(self, members: int, stride: int) -> float:
        """Of a ring through `members` GPUs that are `stride` ranks apart, for each of them.

        NCCL leaves a node by the cards of all members that are in it, and a ring passes each node once: the bytes that
        one member sends are shared out over so many cards.
        """
        in_node = max(1, min(members, self.gpus_a_node // stride))
        if members <= in_node:
            return self.nvlink
        return min(self.nvlink, in_node * self.infiniband)


# Memory


@dataclass(frozen=True)
class Part:
    """What one pipeline stage has: its layers, embedding matrices, and micro-batches whose backward pass is to come."""

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
    """The pipeline's first stage, a middle one, the last: layers shared out so that the fullest has least to hold.

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
    """Bytes on one GPU. `gathered`: weights that stage 3 holds whole for a while, one layer's and the next one's."""

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
    """(weights, gradients, optimizer) of `parameters` of which `trained` are trained, on one of `ranks`.

    ZeRO, section 5: stage 1 splits the optimizer's states, 2 the gradients too, 3 the weights too. Trained in full, a
    parameter is 2 + 2 + 12 bytes; of an adapter in fp32 the weight is its own master, and it is 4 + 4 + 8. Frozen
    weights have 2, which stages 1 and 2 do not split.
    """
    own = SINGLE if lora else HALF
    frozen = parameters if lora else 0
    over = [ranks if stage >= least else 1 for least in (3, 2, 1)]
    weights = (HALF * frozen + own * trained) / over[0]
    return weights, own * trained / over[1], (ADAM - (SINGLE if lora else 0)) * trained / over[2]


def memory(arch: Architecture, layout: Layout, work: Work) -> Memory:
    """What the fullest GPU holds."""
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
    """Bytes that one GPU sends in a step, for one purpose, and how long that takes at the link's bandwidth."""

    purpose: str
    sent: float
    seconds: float


def ring(kind: Literal["all-reduce", "all-gather", "reduce-scatter"], size: float, members: int) -> float:
    """Bytes that each of `members` sends for a collective over `size` bytes (of the whole, not of a share)."""
    return (2 if kind == "all-reduce" else 1) * size * (members - 1) / members


def communication(arch: Architecture, layout: Layout, work: Work, cluster: Cluster = Cluster()) -> list[Traffic]:
    """What a GPU of the fullest stage sends in one step. Ranks run through tensor, then data, then pipeline."""
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

    # Data parallel: 2 parameters' worth a step, 3 under stage 3 (ZeRO, section 7), whose gathers, and whose reductions
    # from stage 2 on, come with each micro-batch.
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

    # Tensor parallel: two all-reduces a layer forward and two backward (1909.08053, section 3), and two where the
    # layer is computed again.
    message = HALF * work.micro_batch * work.length * arch.hidden
    if t > 1:
        passes = 3 if work.checkpointing else 2
        add("activations", micro * part.layers * 2 * passes * ring("all-reduce", message, t), t, 1)
    # Pipeline: what one stage hands on, forward and backward (2104.04473, section 3.2); each tensor rank sends it.
    if p > 1:
        add("stages", micro * 2 * message, 2, t * d)
    return found


def bubble(pipeline: int, micro_batches: int) -> float:
    """The time a pipeline stands idle over the time it works: (p - 1) / m (2104.04473, section 2.2.1)."""
    return (pipeline - 1) / micro_batches


def compute_seconds(arch: Architecture, layout: Layout, work: Work, cluster: Cluster = Cluster()) -> float:
    """A step's computation, without bubble: 2 operations a parameter and token forward, 2 for the gradient of what goes
    in, 2 for that of the weights where all are trained, 2 to compute again. Attention's own products are left out.
    """
    passes = 2 + (work.rank is None) + work.checkpointing
    return 2 * passes * arch.parameters * work.sequences * work.length / layout.gpus / cluster.flops


def smallest(arch: Architecture, layouts: Iterator[Layout], work: Work, cluster: Cluster = Cluster()) -> Layout | None:
    """The first of ascending layouts in which the fullest GPU has room; None when it never has."""
    return next((layout for layout in layouts if memory(arch, layout, work).total <= cluster.memory), None)
