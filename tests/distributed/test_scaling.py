"""The formulas against published figures, PEFT's and transformers' counts, and properties of every layout."""

import pytest

from posttrain.distributed.scaling import (
    BLOOM,
    LLAMA3,
    Cluster,
    Layout,
    Work,
    bubble,
    communication,
    compute_seconds,
    memory,
    model_states,
    parts,
    ring,
    smallest,
)

PUBLISHED = {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}  # the models' files on the hub
LAYOUTS = [
    Layout(64), Layout(64, stage=1), Layout(64, stage=2), Layout(64, stage=3), Layout(64, stage=3, shard_group=8),
    Layout(8, 8), Layout(4, 8, 2), Layout(2, 4, 8, 1), Layout(1, 8, 8), Layout(1, 1, 64),
]  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_llama_3_match_the_published_models(name):
    assert LLAMA3[name].parameters == PUBLISHED[name]


def test_parameter_count_of_bloom_matches_its_model_card():
    assert BLOOM.parameters == 176_247_271_424  # its model card
    assert BLOOM.embedding_parameters() == 3_596_615_680


@pytest.mark.parametrize("r", [1, 16])
def test_adapter_parameter_counts_match_peft(r):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    arch = LLAMA3["8B"]
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=arch.vocabulary, hidden_size=arch.hidden, intermediate_size=arch.intermediate,
                num_hidden_layers=arch.layers, num_attention_heads=arch.heads, num_key_value_heads=arch.kv_heads,
                tie_word_embeddings=False,
            )
        )  # fmt: skip
        assert sum(p.numel() for p in model.parameters()) == arch.parameters
        model = get_peft_model(model, LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert arch.layers * arch.adapter_parameters(r) == trained


@pytest.mark.parametrize(("stage", "gb"), enumerate([120, 31.4, 16.6, 1.88]))
def test_model_states_match_figure_1_of_the_zero_paper(stage, gb):
    assert sum(model_states(7.5e9, 7.5e9, stage=stage, ranks=64, lora=False)) / 1e9 == pytest.approx(gb, abs=0.05)


def test_memory_of_blooms_layout_matches_the_published_one():
    layout, work = Layout(8, 4, 12, 1), Work(2048, 2048, micro_batch=2)
    assert layout.gpus == 384
    assert work.micro_batches(layout) == 128
    assert [p.layers for p in parts(BLOOM, layout, work)] == [5, 6, 5]  # 70 layers and two embeddings, 6 per stage
    assert bubble(12, 128) == 11 / 128
    assert 2 * BLOOM.parameters / 2**30 == pytest.approx(329, rel=0.005)  # GB of its bf16 weights
    assert 14 * BLOOM.parameters / 2**40 == pytest.approx(2.3, rel=0.03)  # with the optimizer's states
    assert memory(BLOOM, layout, work).total < 60e9  # what was used, with what the formula leaves out


def test_layers_of_llama_405b_in_16_stages_match_the_paper():
    """126 layers and two embeddings: the end stages have one layer less (Llama 3, arXiv 2407.21783, section 3.3.2)."""
    assert [p.layers for p in parts(LLAMA3["405B"], Layout(1, 8, 16), Work())] == [7, 8, 7]


def test_tensor_parallel_traffic_matches_megatrons_formula():
    """8 b s h (t - 1) / t per layer and micro-batch without checkpointing (2104.04473, section 3.2), 2 bytes each."""
    arch, t, work = LLAMA3["8B"], 8, Work(sequences=5, length=1000, micro_batch=1, checkpointing=False)
    (traffic,) = communication(arch, Layout(1, t), work)
    assert traffic.sent == pytest.approx(2 * 8 * 1000 * arch.hidden * (t - 1) / t * arch.layers * 5)


def test_pipeline_traffic_matches_megatrons_formula():
    """b s h between stages, per micro-batch and direction."""
    arch, work = LLAMA3["8B"], Work(sequences=6, length=1000, micro_batch=2)
    (traffic,) = communication(arch, Layout(1, 1, 4), work)
    assert traffic.sent == 3 * 2 * (2 * 1000 * arch.hidden) * 2


def test_zero_traffic_matches_the_papers_formula():
    """On many ranks, 2 x the parameters for DDP and stages 1 and 2, 3 x for stage 3 (ZeRO, section 7)."""
    arch, work = LLAMA3["8B"], Work(sequences=10**6)
    for stage, times in enumerate((2, 2, 2, 3)):
        sent = sum(t.sent for t in communication(arch, Layout(10**6, stage=stage), work))
        assert sent / (2 * arch.parameters) == pytest.approx(times, rel=1e-5)


@pytest.mark.parametrize("work", [Work(), Work(rank=16)], ids=["full", "lora"])
def test_memory_falls_with_each_zero_stage(work):
    for arch in LLAMA3.values():
        states = [memory(arch, Layout(64, stage=stage), work).states for stage in range(4)]
        assert states == sorted(states, reverse=True) and len(set(states)) == 4
        assert memory(arch, Layout(1), work).states >= 16 * arch.parameters * (work.rank is None)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rank", [None, 16])
def test_properties_of_every_layout(layout, rank):
    arch = LLAMA3["70B"]
    work = Work(rank=rank)
    held = memory(arch, layout, work)
    stages = parts(arch, layout, work)
    # No layer is lost, and all GPUs together hold one copy of everything at least.
    middle = stages[1].layers * (layout.pipeline - 2) if layout.pipeline > 2 else 0
    ends = stages[0].layers + (stages[-1].layers if layout.pipeline > 1 else 0)
    assert 0 <= ends + middle - arch.layers < layout.pipeline
    assert held.states * layout.gpus >= (16 if rank is None else 2) * arch.parameters
    assert held.total > held.states
    traffic = communication(arch, layout, work)
    assert traffic and all(t.sent > 0 and t.seconds > 0 for t in traffic)
    # Twice the bandwidth, half the time; the bytes stay.
    double = communication(arch, layout, work, Cluster(nvlink=900e9, infiniband=100e9))
    assert [t.sent for t in double] == [t.sent for t in traffic]
    assert sum(t.seconds for t in double) == pytest.approx(sum(t.seconds for t in traffic) / 2)
    # Without checkpointing more is kept and less is computed.
    plain = Work(rank=rank, checkpointing=False)
    assert memory(arch, layout, plain).activations > held.activations
    assert compute_seconds(arch, layout, plain) < compute_seconds(arch, layout, work)


def test_bandwidth_of_a_ring():
    cluster = Cluster(gpus_per_node=8, nvlink=450e9, infiniband=50e9)
    assert cluster.bandwidth(8, 1) == 450e9  # inside a node
    assert cluster.bandwidth(64, 1) == 400e9  # eight cards carry what one member sends
    assert cluster.bandwidth(64, 8) == 50e9  # one member per node
    assert cluster.bandwidth(64, 4) == 100e9
    assert cluster.bandwidth(2, 4) == 450e9
    assert ring("all-reduce", 100, 4) == 150 and ring("all-gather", 100, 4) == 75


def test_smallest_finds_the_first_layout_that_fits():
    layouts = [Layout(n, stage=3) for n in (1, 2, 4, 8, 16)]
    assert smallest(LLAMA3["8B"], iter(layouts), Work()) == Layout(2, stage=3)  # 64 GB of states
    assert smallest(LLAMA3["405B"], iter(layouts), Work()) is None


def test_activations_of_a_gpt_match_korthikantis_formula():
    """34 s b h (2205.05198, section 4.1) less two dropouts' masks, 1 each; flash attention keeps a log-sum."""
    assert BLOOM.activation_bytes() == (34 - 2) * BLOOM.hidden + 4 * BLOOM.heads
    whole, split = 8 * BLOOM.hidden, BLOOM.activation_bytes() - 8 * BLOOM.hidden
    assert BLOOM.activation_bytes(4) == whole + split / 4
