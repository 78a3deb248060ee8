"""Attention with fewer key-value heads than query heads, on a CPU."""

import os


def use_grouped_heads() -> bool:
    """Let the attention kernel share key-value heads among query heads, if there is no accelerator.

    If a batch has padding, transformers repeats keys and values for each query head instead, except for a single token,
    because on CUDA shared heads and a mask would select a slow kernel (`transformers/integrations/sdpa_attention.py`,
    `use_gqa_in_sdpa`). The CPU's kernel is not slower: same numbers, no copies. The switch is an environment variable
    of transformers; a value that is already set is kept. Returns whether there is no accelerator.
    `benchmarks/train.py --gains` measures it.
    """
    import torch

    if torch.accelerator.is_available():
        return False
    os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    return True
