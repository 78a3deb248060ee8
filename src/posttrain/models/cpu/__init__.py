"""Faster code on a CPU with the same results, enabled by `install()`."""


def install() -> None:
    """Replace TRL's language-model head, PEFT's LoRA layer and transformers' attention call in this process for good.

    With an accelerator they compute as before. Safe to call again.
    """
    from .attention import use_grouped_heads
    from .lm_head import use_dense_lm_head
    from .lora import use_accumulated_lora

    use_dense_lm_head()
    use_accumulated_lora()
    use_grouped_heads()
