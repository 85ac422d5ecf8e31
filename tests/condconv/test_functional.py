"""Every execution strategy against a float64 loop over the examples."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from condconv import condconv2d, strategies
from condconv.geometry import same_padding

STRATEGIES = ("matmul", "grouped", "loop")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    routing_weights: Tensor
    bias: Tensor | None
    options: dict[str, Any]

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self[:4] if isinstance(tensor, Tensor)]


def make_case(
    *,
    batch: int = 3,
    num_experts: int = 3,
    channels: int = 4,
    out_channels: int = 6,
    kernel_size: tuple[int, int] = (3, 3),
    size: tuple[int, int] = (7, 6),
    groups: int = 1,
    bias: bool = True,
    layout: str = "contiguous",
    transposed_experts: bool = False,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = random(batch, channels, *size)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = random(size[1], batch, 2 * channels, size[0])[:, :, ::2].permute(1, 2, 3, 0)
    weight = random(num_experts, out_channels, channels // groups, *kernel_size)
    if transposed_experts:
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    case = Case(
        x,
        weight,
        random(batch, num_experts).sigmoid(),
        random(num_experts, out_channels) if bias else None,
        {"groups": groups, **options},
    )
    for tensor in case.leaves():
        tensor.requires_grad_()
    return case


def run(case: Case, strategy: Any = None) -> Tensor:
    return condconv2d(*case[:4], **case.options, strategy=strategy)


def tensorflow_padding(size: int, kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """SAME by the rule of TensorFlow's documentation, in its own words: by remainder."""
    extent = dilation * (kernel_size - 1) + 1
    remainder = size % stride
    total = max(extent - (stride if remainder == 0 else remainder), 0)
    return total // 2, total - total // 2


def loop_reference(case: Case) -> Tensor:
    stride, dilation, groups, padding = (
        case.options.get(name, default)
        for name, default in (("stride", 1), ("dilation", 1), ("groups", 1), ("padding", 0))
    )
    x = case.x
    if padding == "same":
        strides, dilations = (
            (value, value) if isinstance(value, int) else value for value in (stride, dilation)
        )
        pads = [
            tensorflow_padding(x.shape[2 + i], case.weight.shape[3 + i], strides[i], dilations[i])
            for i in range(2)
        ]
        x, padding = F.pad(x, (*pads[1], *pads[0])), 0
    outputs = []
    for example, weights in zip(x, case.routing_weights, strict=True):
        kernel = sum(a * w for a, w in zip(weights, case.weight, strict=True))
        bias = None
        if case.bias is not None:
            bias = sum(a * b for a, b in zip(weights, case.bias, strict=True))
        outputs.append(F.conv2d(example[None], kernel, bias, stride, padding, dilation, groups))
    return torch.cat(outputs)


def assert_equals_reference(case: Case, strategy: Any = None) -> None:
    y, expected = run(case, strategy), loop_reference(case)
    torch.testing.assert_close(y, expected)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    for actual, wanted in zip(
        torch.autograd.grad(y, case.leaves(), grad),
        torch.autograd.grad(expected, case.leaves(), grad),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    return make_case(
        batch=draw(st.integers(1, 4)),
        num_experts=draw(st.integers(1, 4)),
        channels=4,
        out_channels=draw(st.sampled_from([4, 8, 12])),
        kernel_size=draw(pairs(1, 4)),
        size=draw(pairs(7, 10)),
        groups=groups,
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "strided"])),
        transposed_experts=draw(st.booleans()),
        stride=draw(st.integers(1, 3) | pairs(1, 3)),
        dilation=draw(st.integers(1, 2) | pairs(1, 2)),
        padding=draw(st.sampled_from(["same", "valid"]) | st.integers(0, 2) | pairs(0, 2)),
    )


@pytest.fixture
def _mixed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are never kept for the backward pass."""
    monkeypatch.setattr(strategies, "_keeps_kernels", lambda *_: False)


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(strategies, "MAX_EXAMPLES", 2)
    patch.setattr(strategies, "MIXED_BYTES", 1)
    patch.setattr(strategies, "MIN_CHANNELS", 4)


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@settings(derandomize=True, max_examples=60, deadline=None)
@given(case=cases(), small_blocks=st.booleans(), keeps_kernels=st.booleans())
def test_outputs_and_gradients_equal_the_loop(
    strategy: str | None, case: Case, small_blocks: bool, keeps_kernels: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "_keeps_kernels", lambda *_: keeps_kernels)
        if small_blocks:
            use_small_blocks(patch)
            patch.setattr(strategies, "MAX_POSITIONS_PER_CHANNEL", 1)
            patch.setattr(strategies, "MAX_ROWS", 10)
        assert_equals_reference(case, strategy)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_same_padding_is_tensorflows(
    size: int, kernel_size: int, stride: int, dilation: int
) -> None:
    before, after = same_padding(size, kernel_size, stride, dilation)
    assert (before, after) == tensorflow_padding(size, kernel_size, stride, dilation)
    extent = dilation * (kernel_size - 1) + 1
    assert (size + before + after - extent) // stride + 1 == -(-size // stride)


def test_a_large_kernel_of_one_example_is_mixed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "MIN_SHARED", 1)
    case = make_case(batch=1, channels=8)
    with torch.profiler.profile() as profile, torch.no_grad():
        y = run(case)
    assert "aten::bmm" in {event.name for event in profile.events()}
    torch.testing.assert_close(y, loop_reference(case))


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("groups", [1, 4])
def test_an_empty_batch_gives_an_empty_output(strategy: str | None, groups: int) -> None:
    case = make_case(batch=0, groups=groups, out_channels=8, padding=1)
    y = run(case, strategy)
    assert y.shape == (0, 8, 7, 6)
    y.sum().backward()
    assert torch.equal(case.weight.grad, torch.zeros_like(case.weight))


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_memory_format_is_that_of_a_convolution(strategy: str | None, groups: int) -> None:
    case = make_case(layout="channels_last", groups=groups, out_channels=8)
    assert run(case, strategy).is_contiguous(memory_format=torch.channels_last)
    assert run(make_case(groups=groups, out_channels=8), strategy).is_contiguous()


@pytest.mark.usefixtures("_mixed_again")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("groups", [1, 4])
def test_second_derivatives(strategy: str, groups: int) -> None:
    case = make_case(
        batch=2, num_experts=2, size=(4, 4), groups=groups, out_channels=4, channels=4, padding=1
    )

    def function(*inputs: Tensor) -> Tensor:
        return run(Case(*inputs, case.options), strategy)

    assert torch.autograd.gradgradcheck(function, case.leaves(), fast_mode=True)


@pytest.mark.usefixtures("_mixed_again")
@pytest.mark.parametrize("max_rows", [0, 64])
def test_second_derivatives_through_blocks(monkeypatch: pytest.MonkeyPatch, max_rows: int) -> None:
    use_small_blocks(monkeypatch)
    monkeypatch.setattr(strategies, "MAX_ROWS", max_rows)
    case = make_case(batch=2, num_experts=2, size=(4, 4), padding=1)

    def function(*inputs: Tensor) -> Tensor:
        return run(Case(*inputs, case.options), "matmul")

    assert torch.autograd.gradcheck(function, case.leaves(), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, case.leaves(), fast_mode=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("batch", "size", "kept"), [(8, (2, 2), False), (8, (9, 9), True), (3, (2, 2), True)]
)
def test_mixed_kernels_are_kept_only_where_small(
    strategy: str, batch: int, size: tuple[int, int], kept: bool
) -> None:
    case = make_case(batch=batch, num_experts=4, padding=1, size=size)
    sizes = set()

    def record(tensor: Tensor) -> Tensor:
        sizes.add(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        run(case, strategy)
    kernel_size = case.weight[0].numel()
    assert bool(sizes & {kernel_size, batch * kernel_size}) == (kept and strategy == "grouped")


@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 2)])
def test_on_one_position_experts_are_applied_and_none_are_mixed(
    monkeypatch: pytest.MonkeyPatch, kernel_size: tuple[int, int]
) -> None:
    case = make_case(batch=5, kernel_size=kernel_size, size=kernel_size)
    monkeypatch.setattr(strategies, "mix", None)
    monkeypatch.setattr(strategies, "_mix_into", None)
    assert_equals_reference(case)


@pytest.mark.usefixtures("_mixed_again")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", range(3))
def test_frozen_inputs_get_no_gradient(frozen: int, strategy: str) -> None:
    case = make_case(size=(4, 4))
    case[frozen].requires_grad_(False)
    run(case, strategy).sum().backward()
    for i, tensor in enumerate(case.leaves()):
        assert (tensor.grad is None) == (i == frozen)


@pytest.mark.parametrize("keeps_kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_autocast(
    monkeypatch: pytest.MonkeyPatch,
    strategy: str | None,
    dtype: torch.dtype,
    num_experts: int,
    keeps_kernels: bool,
) -> None:
    monkeypatch.setattr(strategies, "_keeps_kernels", lambda *_: keeps_kernels)
    case = make_case(num_experts=num_experts, dtype=torch.float32, padding="same", stride=2)
    with torch.autocast("cpu", dtype):
        y = run(case, strategy)
        assert y.dtype == dtype
        grads = torch.autograd.grad(y.float().square().sum(), case.leaves())
    expected = loop_reference(case)
    wanted = torch.autograd.grad(expected.square().sum(), case.leaves())
    assert_relatively_close(y.float(), expected, 0.02)
    for tensor, actual, grad in zip(case.leaves(), grads, wanted, strict=True):
        assert actual.dtype == tensor.dtype
        assert_relatively_close(actual, grad, 0.04)


def assert_relatively_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (actual - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_rounds_the_mixed_kernel_once(strategy: str) -> None:
    # Products of one nonzero element each: the output is the rounded mixed kernel itself.
    case = make_case(
        channels=1, size=(1, 1), kernel_size=(1, 1), out_channels=64, bias=False,
        dtype=torch.float32,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        y = condconv2d(torch.ones_like(case.x), *case[1:4], strategy=strategy)
    mixed = case.routing_weights @ case.weight.flatten(1)
    torch.testing.assert_close(y.flatten(1), mixed.bfloat16(), rtol=0, atol=0)


def test_autocast_leaves_float64_alone() -> None:
    case = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        y = run(case)
    torch.testing.assert_close(y, loop_reference(case))


def test_integers_are_no_input() -> None:
    case = make_case(dtype=torch.float32)
    images = torch.zeros(case.x.shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"x is torch.uint8 and weight torch.float32"):
        condconv2d(images, *case[1:4])
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"x is torch.uint8"),
    ):
        condconv2d(images, *case[1:4])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_compiles_without_graph_breaks(strategy: str | None, groups: int) -> None:
    case = make_case(groups=groups, out_channels=8, padding="same", stride=2)

    def function(*inputs: Tensor) -> Tensor:
        return run(Case(*inputs, case.options), strategy)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y = compiled(*case[:4])
    grads = torch.autograd.grad(y.square().sum(), case.leaves())
    expected = loop_reference(case)
    torch.testing.assert_close(y, expected)
    for actual, wanted in zip(
        grads, torch.autograd.grad(expected.square().sum(), case.leaves()), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.usefixtures("_mixed_again")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_functional_transforms(strategy: str) -> None:
    case = make_case(padding=1, size=(4, 4))

    def loss(weight: Tensor) -> Tensor:
        return run(case._replace(weight=weight), strategy).square().sum()

    weight = case.weight.detach()
    reference = loop_reference(case).square().sum()
    (expected,) = torch.autograd.grad(reference, case.weight)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    both = torch.func.vmap(torch.func.grad(loss))(torch.stack([weight, weight]))
    torch.testing.assert_close(both, torch.stack([expected, expected]))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (weight,), (weight,))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forward_mode_where_nothing_asks_for_gradients(strategy: str) -> None:
    case = make_case(padding=1)
    for leaf in case.leaves():
        leaf.requires_grad_(False)
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(case.weight, torch.ones_like(case.weight))
        y, tangent = forward_ad.unpack_dual(run(case._replace(weight=weight), strategy))
    # The operation is linear in its kernels.
    moved = run(case._replace(weight=case.weight + 1), strategy)
    torch.testing.assert_close(tangent, moved - y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 7, 7)}, r"x must be \(B, C, H, W\), got \(4, 7, 7\)"),
        ({"x": torch.zeros(2, 5, 7, 7)}, "x has 5 channels, the kernels take 4"),
        ({"weight": torch.zeros(6, 4, 3, 3)}, r"weight must be \(E, O, C / groups, kh, kw\)"),
        ({"routing_weights": torch.zeros(2, 4)}, r"must be \(B, E\) = \(2, 3\), got \(2, 4\)"),
        ({"routing_weights": torch.zeros(1, 3)}, r"must be \(B, E\) = \(2, 3\), got \(1, 3\)"),
        ({"bias": torch.zeros(6)}, r"bias must be \(E, O\) = \(3, 6\), got \(6,\)"),
        ({"groups": 4, "weight": torch.zeros(3, 6, 1, 3, 3)}, "6 output channels cannot be split"),
        ({"padding": "full"}, "padding must be .* got 'full'"),
        ({"strategy": "magic"}, "strategy must be one of .* got 'magic'"),
        (
            {"x": torch.zeros(2, 4, 2, 7)},
            r"kernel \(3, 3\) .* does not fit into the input \(2, 7\)",
        ),
        ({"dilation": 4}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    inputs = {
        "x": torch.zeros(2, 4, 7, 7),
        "weight": torch.zeros(3, 6, 4, 3, 3),
        "routing_weights": torch.zeros(2, 3),
        "bias": torch.zeros(3, 6),
    }
    with pytest.raises(ValueError, match=message):
        condconv2d(**(inputs | change))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize("padding", [0, (2, 1), "same"])
@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3), (3, 2)])
def test_an_export_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
    kernel_size: tuple[int, int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> None:
    """Without the tracing: exported operations are plain ones, chosen by what traces."""
    x, routing_weights = torch.randn(3, 4, 11, 9), torch.rand(3, 2)
    weight = torch.randn(2, 8, 4 // groups, *kernel_size)

    def convolve() -> Tensor:
        return condconv2d(x, weight, routing_weights, stride=stride, padding=padding,
                          dilation=dilation, groups=groups)  # fmt: skip

    expected = convolve()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(convolve(), expected, rtol=1e-4, atol=1e-4)
