"""A network of conditional layers of every origin, in the places where networks are used."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from timm.models._efficientnet_blocks import CondConvResidual, InvertedResidual
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from condconv import CondConv2d, RoutedCondConv2d, accelerate_timm, convert_to_condconv
from condconv.backbones.mobilenet_v1 import ConvNormAct, RoutedBlock

NUM_EXPERTS = 3


def make_network(seed: int = 0) -> nn.Sequential:
    """Depthwise, pointwise and strided layers; built, converted and timm's; routed alone or not."""
    torch.manual_seed(seed)

    def conv(in_channels: int, out_channels: int, kernel_size: int, **options: int) -> ConvNormAct:
        return ConvNormAct(
            in_channels, out_channels, kernel_size, num_experts=NUM_EXPERTS, **options
        )

    network = nn.Sequential(
        ConvNormAct(3, 8, 3, stride=2),
        RoutedBlock(
            {"depthwise": conv(8, 8, 3, groups=8), "pointwise": conv(8, 16, 1)},
            in_channels=8,
            num_experts=NUM_EXPERTS,
        ),
        RoutedBlock(
            {"reduce": conv(16, 8, 1), "expand": conv(8, 16, 3, stride=2)},
            in_channels=16,
            num_experts=NUM_EXPERTS,
        ),
        convert_to_condconv(
            InvertedResidual(16, 16, exp_ratio=2, act_layer=nn.SiLU),
            NUM_EXPERTS,
            share_within=lambda _, module: isinstance(module, InvertedResidual),
        ),
        accelerate_timm(
            CondConvResidual(16, 16, exp_ratio=2, act_layer=nn.SiLU, num_experts=NUM_EXPERTS),
            channels_last=False,
        ),
        RoutedCondConv2d(16, 5, 1, num_experts=NUM_EXPERTS),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for module in network.modules():
        if isinstance(module, ConvNormAct):
            module.activation = nn.SiLU()  # has no kinks for a finite difference to step over
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network(make_images(8))
    return network.eval()


def make_images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def loss_of(y: Tensor) -> Tensor:
    return y.float().square().mean()


def gradients(network: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    network.zero_grad()
    loss_of(run()).backward()
    found = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def test_a_training_step_compiles_as_one_graph() -> None:
    network = make_network().train()
    twin = make_network().train()
    images = make_images(4)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    actual = gradients(network, lambda: compiled(images))
    for name, expected in gradients(twin, lambda: twin(images)).items():
        assert_near(actual[name], expected, 1e-4)
    for buffer, expected in zip(network.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(images), twin.eval()(images))


@torch.no_grad()
def test_a_second_batch_size_compiles_for_all() -> None:
    network = make_network()
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        compiled(make_images(batch))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (5, 8):
            images = make_images(batch)
            torch.testing.assert_close(compiled(images), network(images))


LAYERS = {
    "pointwise": (8, 16, 1),
    "pointwise, stride": (8, 16, 1, 2),
    "3 x 3": (8, 16, 3, 1, 1),
    "3 x 3, same": (8, 16, 3, 2, "same"),
    "3 x 3, dilation": (8, 16, 3, 1, 2, 2),
    "3 x 3, groups": (8, 16, 3, 1, 1, 1, 2),
    "depthwise": (8, 8, 3, 1, 1, 1, 8),
    "depthwise, same": (8, 8, 3, 2, "same", 1, 8),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "how"),
    [
        *((layer, "marked") for layer in LAYERS),
        *itertools.product(["3 x 3, same", "depthwise"], ["dynamic", "unbacked"]),
    ],
)
def test_an_open_batch_compiles_once(layer: str, how: str, training: bool) -> None:
    assert_compiles_once(layer, how, training, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["dynamic", "marked"])
@pytest.mark.parametrize("layer", ["3 x 3, same", "depthwise"])
def test_an_open_batch_in_inductor(layer: str, how: str, training: bool) -> None:
    assert_compiles_once(layer, how, training, "inductor")


def assert_compiles_once(layer: str, how: str, training: bool, backend: str) -> None:
    torch.manual_seed(0)
    module = RoutedCondConv2d(*LAYERS[layer], num_experts=NUM_EXPERTS)
    torch.compiler.reset()
    compiled = torch.compile(
        module, fullgraph=True, backend=backend, dynamic=True if how == "dynamic" else None
    )
    for batch in (2, 3, 5):
        x = torch.randn(batch, 8, 9, 9, requires_grad=training)
        twin = x.detach().clone().requires_grad_(training)
        if how == "marked":
            torch._dynamo.mark_dynamic(x, 0)
        elif how == "unbacked":
            torch._dynamo.decorators.mark_unbacked(x, 0)
        stance = "default" if batch == 2 else "fail_on_recompile"
        with torch.set_grad_enabled(training), torch.compiler.set_stance(stance):
            y = compiled(x)
        torch.testing.assert_close(y, module(twin))
        if training:
            actual = gradients(module, lambda y=y: y)
            for name, expected in gradients(module, lambda x=twin: module(x)).items():
                assert_near(actual[name], expected, 1e-4)
            assert x.grad is not None and twin.grad is not None
            assert_near(x.grad, twin.grad, 1e-4)


@pytest.mark.slow
def test_inductor() -> None:
    network = make_network()
    images = make_images(4)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True)
    actual = gradients(network, lambda: compiled(images))
    for name, expected in gradients(network, lambda: network(images)).items():
        assert_near(actual[name], expected, 1e-4)


def test_torch_export() -> None:
    network = make_network()
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(network, (make_images(2),), dynamic_shapes=({0: batch},))
    for size in (1, 3, 8):
        images = make_images(size)
        torch.testing.assert_close(exported.module()(images), network(images))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("traced_batch", [1, 2])
def test_a_trace_of_torch_jit_holds_for_every_batch(traced_batch: int) -> None:
    network = make_network().eval()
    traced: Any = torch.jit.trace(network, make_images(traced_batch))
    for size in (1, 2, 12):
        images = make_images(size)
        torch.testing.assert_close(traced(images), network(images))


def test_features_are_extracted_by_torch_fx() -> None:
    network, images = make_network().eval(), make_images(3)
    extractor = create_feature_extractor(network, {"5": "y"}).eval()
    torch.testing.assert_close(extractor(images)["y"], network[:6](images))


def test_onnx(tmp_path: Path) -> None:
    network = make_network()
    session = export_onnx(network, make_images(2), tmp_path)
    for size in (1, 3, 8):
        images = make_images(size)
        (y,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), network(images), rtol=1e-4, atol=1e-5)


def export_onnx(network: nn.Module, images: Tensor, folder: Path) -> onnxruntime.InferenceSession:
    file = folder / "network.onnx"
    torch.onnx.export(
        network, (images,), file, dynamo=True, verbose=False,
        input_names=["images"], dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    network = make_network()
    images = make_images(8)
    expected_gradients = gradients(network, lambda: network(images))
    with torch.autocast("cpu", dtype):
        y = network(images)
        actual = gradients(network, lambda: network(images))
    assert y.dtype == dtype
    assert_near(y, network(images), 4 * torch.finfo(dtype).eps)
    assert all(gradient.dtype == torch.float32 for gradient in actual.values())
    routers = [name for name in actual if "router" in name or "routing_fn" in name]
    for name in actual.keys() - routers:
        assert_near(actual[name], expected_gradients[name], 0.1)
    # Some routers' alone are sums that nearly cancel.
    assert_near(
        *(torch.cat([g[name].flatten() for name in routers]) for g in (actual, expected_gradients)),
        0.05,
    )


def test_channels_last_stays_all_the_way() -> None:
    network = make_network()
    images = make_images(4)
    expected = network(images)
    outputs = {}
    for name, module in network.named_modules():
        if isinstance(module, CondConv2d):
            module.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
    for layout in (torch.channels_last, torch.contiguous_format):
        network.to(memory_format=layout)
        torch.testing.assert_close(network(images.to(memory_format=layout)), expected)
        assert len(outputs) == 11
        for name, y in outputs.items():
            assert y.is_contiguous(memory_format=layout), name


WORKER = """
import copy
import sys
import torch
from torch.distributed import init_process_group
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
network = torch.load(f"{folder}/network.pt", weights_only=False)
images = torch.load(f"{folder}/images.pt").chunk(2)[rank]
sharded = fully_shard(copy.deepcopy(network)).double()  # three experts for two processes
sharded(images.double()).square().mean().backward()
parallel = DistributedDataParallel(network)
parallel(images).square().mean().backward()
gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
gathered = {name: parameter.grad.full_tensor() for name, parameter in sharded.named_parameters()}
torch.save([gradients, gathered], f"{folder}/gradients{rank}.pt")
"""


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    network, images = make_network(), make_images(6)
    torch.save(network, tmp_path / "network.pt")
    torch.save(images, tmp_path / "images.pt")
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = [torch.load(tmp_path / f"gradients{rank}.pt") for rank in range(2)]
    for name, expected in gradients(network, lambda: network(images)).items():
        for first, second in zip(*found, strict=True):  # replicated, sharded
            assert torch.equal(first[name], second[name]), name
            assert_near(first[name].float(), expected, 1e-5)


def test_no_way_of_running_changes_the_state() -> None:
    network = make_network()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for batch in (1, 8):
        network(make_images(batch)).sum().backward()
        with torch.inference_mode():
            network(make_images(batch))
    torch.export.export(network, (make_images(2),))
    assert network.state_dict().keys() == state.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("assign", [False, True])
def test_from_the_meta_device(assign: bool) -> None:
    network, images = make_network(), make_images(2)
    empty = copy.deepcopy(network).to("meta")
    y = empty(images.to("meta"))
    assert y.is_meta and y.shape == (2, 5)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(network.state_dict(), assign=assign)
    torch.testing.assert_close(empty(images), network(images))


def test_gradients_of_each_example() -> None:
    network, images = make_network(), make_images(3)
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}

    def loss(state: dict[str, Tensor], example: Tensor) -> Tensor:
        return loss_of(functional_call(network, state, (example[None],)))

    names = {name for name, _ in network.named_parameters()}
    parameters = {name: tensor for name, tensor in state.items() if name in names}
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for i in range(3):
        expected = gradients(network, lambda i=i: network(images[i : i + 1]))
        for name in names:
            assert_near(each[name][i], expected[name], 1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_ensemble_in_one_call(layout: torch.memory_format) -> None:
    networks = [make_network(seed) for seed in range(3)]
    images = make_images(10).to(memory_format=layout)
    parameters, buffers = stack_module_state(networks)

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(networks[0], (parameters, buffers), (images,))

    y = vmap(run, in_dims=(0, 0, None))(parameters, buffers, images)
    torch.testing.assert_close(y, torch.stack([network(images) for network in networks]))
    torch.stack([loss_of(part) for part in y]).sum().backward()
    expected = [gradients(network, lambda n=network: n(images)) for network in networks]
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert_near(parameter.grad, torch.stack([grads[name] for grads in expected]), 1e-4)


def test_gradient_of_a_gradient() -> None:
    """A gradient penalty, against finite differences."""
    network = make_network().double()
    images = make_images(2).double().requires_grad_()
    parameters = list(network.parameters())

    def penalty(*_: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(network(images).square().sum(), images, create_graph=True)
        return slope.square().sum()

    assert torch.autograd.gradcheck(penalty, parameters, fast_mode=True)


def test_activation_checkpointing() -> None:
    network, images = make_network(), make_images(4)
    actual = gradients(network, lambda: checkpoint(network, images, use_reentrant=False))
    for name, expected in gradients(network, lambda: network(images)).items():
        torch.testing.assert_close(actual[name], expected, rtol=0, atol=0)
