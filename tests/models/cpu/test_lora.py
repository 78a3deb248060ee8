"""The accumulated LoRA layer against PEFT's own: the same output, the same gradients; all else goes to PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from trl.trainer.utils import disable_dropout_in_model

from posttrain.models.cpu import lora


@pytest.fixture(autouse=True)
def switched(monkeypatch):
    """PEFT's class as it was, whatever ran before; the replacement is installed, twice."""
    monkeypatch.setattr(Linear, "forward", getattr(Linear, "peft_forward", Linear.forward))
    if hasattr(Linear, "peft_forward"):
        monkeypatch.delattr(Linear, "peft_forward")
    lora.use_accumulated_lora()
    lora.use_accumulated_lora()
    yield
    if "peft_forward" in vars(Linear):
        del Linear.peft_forward


@pytest.fixture
def calls(monkeypatch):
    """How often the replacement computed."""
    counted = []
    apply = lora.LowRankLinear.apply
    monkeypatch.setattr(lora.LowRankLinear, "apply", lambda *args: counted.append(1) or apply(*args))
    return counted


def layers(bias=True, **options):
    """Two layers in one model, with an adapter that is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=bias), nn.Tanh(), nn.Linear(20, 7, bias=bias))
    config = LoraConfig(target_modules=["0", "2"], **{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})
    return get_peft_model(model, config)


def adapted(model):
    return [m for m in model.modules() if isinstance(m, Linear)]


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    torch.manual_seed(1)
    (y * torch.randn_like(y)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return y.detach(), x.grad, grads


def with_peft(model, x):
    ours = Linear.forward
    Linear.forward = Linear.peft_forward
    try:
        return run(model, x)
    finally:
        Linear.forward = ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_equals_peft_forwards_and_backwards(bias, shape, calls):
    model, x = layers(bias), torch.randn(shape)
    got, expected = run(model, x), with_peft(model, x)
    assert len(calls) == 2
    torch.testing.assert_close(got, expected)
    assert len(got[2]) == 4  # A and B of both layers, and nothing of the base


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((3, 5), (2, 5), (4, 2)))
    weight, bias = torch.randn(4, 5, dtype=torch.double), torch.randn(4, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x, a, b: lora.LowRankLinear.apply(x, weight, bias, (1.5,), a, b), (x, a, b))


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (12,)])
def test_any_number_of_rows_equals_peft(shape, calls):
    model, x = layers(), torch.randn(shape)
    torch.testing.assert_close(run(model, x), with_peft(model, x))
    assert len(calls) == 2


def test_the_output_may_be_changed_in_place():
    """As OLMo does with its queries, and an in-place activation."""
    model = get_peft_model(nn.Sequential(nn.Linear(12, 20)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 12)
    model(x).clamp_(-0.5, 0.5).sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).clamp(-0.5, 0.5).sum().backward()
    assert got and all(torch.equal(p.grad, got[n]) for n, p in model.named_parameters() if p.grad is not None)


def test_only_trained_tensors_get_a_gradient(calls):
    model, x = layers(), torch.randn(3, 12)
    adapted(model)[0].lora_A["default"].requires_grad_(False)
    model(x).sum().backward()
    assert adapted(model)[0].lora_A["default"].weight.grad is None
    assert adapted(model)[0].lora_B["default"].weight.grad.abs().sum() > 0
    with torch.inference_mode():
        model(x)
    assert len(calls) == 4


def test_offloaded_weights_go_to_peft(calls):
    from accelerate import cpu_offload

    model, x = layers(), torch.randn(3, 12)
    expected = model(x).detach()
    calls.clear()
    cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(model(x).detach(), expected)
    assert not calls


def test_rows_with_adapters_of_their_own_go_to_peft(calls):
    model, x = layers(), torch.randn(2, 12)
    model.eval()(x, adapter_names=["default", "__base__"])
    assert not calls


def test_a_strided_input_is_computed_as_it_is(calls):
    model, x = layers(), torch.randn(12, 3, 2).transpose(0, 2)
    torch.testing.assert_close(run(model, x), with_peft(model, x))
    assert len(calls) == 2


@pytest.mark.parametrize(
    "options, prepare",
    [
        ({"lora_dropout": 0.5}, lambda m: m.train()),
        ({"use_dora": True}, lambda m: m),
        ({"lora_bias": True}, lambda m: m),
        ({}, lambda m: m.bfloat16()),
        ({}, lambda m: [layer.base_layer.requires_grad_() for layer in adapted(m)]),
        ({}, lambda m: [layer.lora_A["default"].register_forward_hook(lambda *a: None) for layer in adapted(m)]),
        ({}, lambda m: [layer.base_layer.register_forward_pre_hook(lambda *a: None) for layer in adapted(m)]),
        ({}, lambda m: [layer.lora_B["default"].register_full_backward_hook(lambda *a: None) for layer in adapted(m)]),
        ({}, lambda m: [setattr(layer.base_layer, "forward", layer.base_layer.forward) for layer in adapted(m)]),
        ({}, lambda m: [layer.scaling.update(default=torch.tensor(1.5)) for layer in adapted(m)]),
        ({}, lambda m: m.base_model.disable_adapter_layers()),
        ({}, lambda m: m.merge_adapter()),
    ],
    ids=[
        "dropout",
        "dora",
        "bias",
        "bf16",
        "trained base",
        "hook",
        "pre-hook",
        "backward hook",
        "replaced forward",
        "learned scaling",
        "no adapter",
        "merged",
    ],
)
def test_layers_that_are_not_plain_go_to_peft(options, prepare, calls):
    model = layers(**options)
    prepare(model)
    model(torch.randn(3, 12).to(adapted(model)[0].base_layer.weight.dtype))
    assert not calls


def test_two_adapters_at_once_and_autocast_go_to_peft(calls):
    model, x = layers(), torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    model(x)
    assert not calls
    model.set_adapter("second")
    assert len(calls) == 0 and model(x) is not None and len(calls) == 2


def test_dropout_that_is_off_is_plain(calls):
    off, switched_off = layers(lora_dropout=0.5).eval(), layers(lora_dropout=0.5).train()
    disable_dropout_in_model(switched_off)
    x = torch.randn(3, 12)
    for model in (off, switched_off):
        calls.clear()
        torch.testing.assert_close(run(model, x), with_peft(model, x))
        assert len(calls) == 2


def test_gradient_checkpointing_recomputes_the_same(calls):
    from torch.utils.checkpoint import checkpoint

    model, x = layers(), torch.randn(3, 12)
    inner = model.base_model.model
    plain = run(model, x)
    model.base_model.model = nn.Sequential(*inner)
    forward = model.forward
    model.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    torch.testing.assert_close(run(model, x), plain)
    assert len(calls) == 6


def two_adapters(**options):
    model = layers()
    config = LoraConfig(target_modules=["0", "2"], r=3, lora_alpha=12, init_lora_weights=False, **options)
    model.add_adapter("second", config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def test_side_by_side_each_part_has_its_adapter():
    """Outputs and all gradients are those of PEFT's forward, one adapter after the other."""
    model, x = two_adapters(), torch.randn(4, 3, 12)
    parts = []
    for number, name in enumerate(("second", "default")):
        for layer in adapted(model):
            layer._active_adapter = [name]
        part = x[2 * number : 2 * number + 2].clone().requires_grad_()
        y = Linear.peft_forward(adapted(model)[1], Linear.peft_forward(adapted(model)[0], part).tanh())
        (y**2).sum().backward()
        parts.append((y.detach(), part.grad))
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(expected) == 8
    model.zero_grad()

    whole = x.clone().requires_grad_()
    assert lora.all_plain(adapted(model), ("second", "default"))
    with lora.side_by_side(adapted(model), ("second", "default"), x.shape[:2]):
        y = model(whole)
    (y**2).sum().backward()
    torch.testing.assert_close(y.detach(), torch.cat([y for y, _ in parts]))
    torch.testing.assert_close(whole.grad, torch.cat([grad for _, grad in parts]))
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


def test_side_by_side_a_frozen_adapter_leaves_the_other_its_gradient():
    model, x = two_adapters(), torch.randn(4, 3, 12)
    for layer in adapted(model):
        layer.lora_A["default"].requires_grad_(False)
        layer.lora_B["default"].requires_grad_(False)
    with lora.side_by_side(adapted(model), ("default", "second"), x.shape[:2]):
        model(x).sum().backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert grads == {n for n, _ in model.named_parameters() if ".second." in n}


def test_side_by_side_refuses_other_rows_and_ends_with_its_block():
    model, x = two_adapters(), torch.randn(4, 3, 12)
    before = model(x)
    for other in (x[:, :2], x.reshape(12, 12), x.reshape(3, 4, 12), x.bfloat16()):
        with pytest.raises(lora.NotSideBySide), lora.side_by_side(adapted(model), ("default", "second"), x.shape[:2]):
            model(other)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda m: m.bfloat16(),
        lambda m: m.merge_adapter(["default"]),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.delete_adapter("second"),
        lambda m: adapted(m)[1].lora_B["second"].register_forward_hook(lambda *a: None),
        lambda m: m.train(),
    ],
    ids=["bf16", "merged", "no adapter", "one adapter", "hook", "dropout"],
)
def test_layers_that_are_not_plain_are_not_computed_side_by_side(prepare):
    model = two_adapters(lora_dropout=0.5).eval()
    assert lora.all_plain(adapted(model), ("default", "second"))
    prepare(model)
    assert not lora.all_plain(adapted(model), ("default", "second"))


def test_nothing_is_plain_under_autocast_or_without_layers():
    model = two_adapters()
    assert not lora.all_plain([], ("default", "second"))
    assert not lora.all_plain([*adapted(model), nn.Linear(2, 2)], ("default", "second"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not lora.all_plain(adapted(model), ("default", "second"))


def test_folded_gives_the_same_outputs_by_the_base_alone_and_puts_the_weights_back(calls):
    model, x = layers(), torch.randn(5, 12)
    before = model(x).detach()
    weights = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    calls.clear()
    with pytest.raises(RuntimeError, match="in the middle"), lora.folded(model):
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
        assert not calls
        with torch.no_grad():
            torch.testing.assert_close(adapted(model)[0](x), nn.functional.linear(
                x, adapted(model)[0].base_layer.weight, adapted(model)[0].base_layer.bias))  # fmt: skip
        raise RuntimeError("in the middle")
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == {n: at for n, (at, _) in weights.items()}
    assert all(torch.equal(p, weights[n][1]) for n, p in model.named_parameters())
    assert torch.equal(model(x), before)


def test_folding_that_fails_halfway_leaves_nothing_folded(monkeypatch):
    model, x = layers(), torch.randn(5, 12)
    before, product, calls = model(x).detach(), torch.addmm, []

    def fails_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return product(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "addmm", fails_at_the_second)
        with pytest.raises(MemoryError), lora.folded(model):
            pass
    assert not any("forward" in vars(layer) for layer in adapted(model))
    assert torch.equal(model(x), before)


def test_folded_leaves_layers_alone_that_are_not_plain():
    """16 bits would round the sum; DoRA's sum is another one."""
    for model in (layers().to(torch.bfloat16), layers(use_dora=True)):
        pointers = [layer.base_layer.weight.data_ptr() for layer in adapted(model)]
        with lora.folded(model):
            assert [layer.base_layer.weight.data_ptr() for layer in adapted(model)] == pointers
            assert not any(layer.merged for layer in adapted(model))
