"""The work of a GPU, tested without one: the number of kernel launches, no host sync, only bytes sent to it."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab import deeplabv2, fold_batch_norm, multi_scale_loss, single_scale_loss
from deeplab.weights.apply import apply_weights
from deeplab.weights.weights import Weights
from tests.helpers_devices import STEP, VARIANTS, data_of
from tests.helpers_nets import naive_forward, randomise_batch_norm
from tests.helpers_runs import train, train_msc
from utils.evaluation import predict as prediction
from utils.evaluation import score

LOSSES = {"one scale": single_scale_loss, "three scales": multi_scale_loss}


class Launches(TorchDispatchMode):
    """Counts the operators that would run on a GPU: all except views. ``_foreach`` counts once per tensor, a convolution with a
    bias twice, since cuDNN adds it in a separate kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = [result.alias_info for result in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in views):
            self.names[func._schema.name] += len(args[0]) if "_foreach" in func._schema.name else 1
            self.names["bias"] += func._schema.name == "aten::convolution" and args[2] is not None
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return sum(self.names.values())


# ---- kernel launches


@pytest.mark.parametrize(
    ("loss", "size", "amp", "most"),
    [
        ("one scale", "output", False, 482),
        ("one scale", "input", False, 474),
        ("one scale", "output", True, 595),
        ("three scales", "output", False, 1248),
        ("three scales", "input", False, 1216),
        ("three scales", "output", True, 1377),
    ],
)
def test_launches_of_a_forward_pass(loss, size, amp, most):
    """ResNet-101 and its loss, exactly; bf16 on a CPU, since meta tensors have no autocast."""
    device = "cpu" if amp else "meta"
    with torch.device(device):
        net = deeplabv2().train()
        images, labels = torch.zeros(1, 3, 33, 33), torch.zeros(1, 33, 33, dtype=torch.int64)
    with Launches() as launches, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        LOSSES[loss](net, images, labels, size=size)
    assert launches.count == most
    convolutions = 105 if amp else 108  # ASPP as one product
    assert launches.names["aten::convolution"] == convolutions * (3 if "three" in loss else 1)
    assert launches.names["aten::rsqrt"] == 1  # the constants of all layers at once


def test_launches_of_a_backward_pass():
    """One product per folded weight for any number of scales; the counter also sees loops over tensors."""
    counts = {}
    for name, loss in LOSSES.items():
        with torch.device("meta"):
            net = deeplabv2("resnet18", 3).train()
            images, labels = torch.zeros(1, 3, 65, 65), torch.zeros(1, 65, 65, dtype=torch.int64)
        losses = loss(net, images, labels)
        with Launches() as launches:
            losses["loss"].backward()
        counts[name] = launches.names["aten::mul"]
    assert counts == {"one scale": 20, "three scales": 20}
    with Launches() as launches:
        torch._foreach_mul([torch.ones(2), torch.ones(3)], 2.0)[1].view(3, 1)
    assert launches.count == 4  # two products, and two tensors of ones


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_become_ready_layer_by_layer(loss, grad_checkpoint):
    """Before the backward pass of the first convolution at the last scale, all other weights have their gradients, so that
    DistributedDataParallel has sent them."""
    torch.manual_seed(0)
    net = randomise_batch_norm(deeplabv2("resnet18", 3)).train()
    net.grad_checkpoint = grad_checkpoint
    weights = [parameter for parameter in net.parameters() if parameter.dim() == 4]
    ready, ready_before_the_first = [], []
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda weight: ready.append(weight))
    hook = lambda gradient: ready_before_the_first.append(len(ready))  # noqa: E731
    net.maxpool.register_forward_pre_hook(lambda module, inputs: inputs[0].register_hook(hook) and None)
    LOSSES[loss](net, torch.randn(1, 3, 33, 41), torch.randint(0, 3, (1, 33, 41)))["loss"].backward()
    assert len(ready) == len(weights)
    assert ready_before_the_first[-1] == len(weights) - 1
    assert ready[-1] is net.conv1.weight


# ---- folding


def naive_loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss at three scales and of their maximum, of the naive net without folding."""
    return multi_scale_loss(partial(naive_forward, net), images, labels)["loss"]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * float(b.abs().max()))


@pytest.mark.parametrize("one_scale_at_a_time", [False, True])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_folded_once_for_all_scales(grad_checkpoint, one_scale_at_a_time):
    """Accumulated gradients of two batches against the unfolded net; recomputed passes use the same folded weights."""
    torch.manual_seed(0)
    net = randomise_batch_norm(deeplabv2("resnet18", 3).double()).train()
    net.grad_checkpoint = grad_checkpoint
    batches = [(torch.randn(1, 3, 33, 41, dtype=torch.float64), torch.randint(0, 3, (1, 33, 41))) for _ in range(2)]
    folds = 0
    with Launches() as launches:
        for images, labels in batches:
            multi_scale_loss(net, images, labels, one_scale_at_a_time=one_scale_at_a_time)["loss"].backward()
    folds = launches.names["aten::rsqrt"]
    assert folds == len(batches)
    found = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    for images, labels in batches:
        naive_loss(net, images, labels).backward()
    same(found, [parameter.grad for parameter in net.parameters()])


def changed_in_place(net: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in net.state_dict().items():
        value.copy_(state[name])


def changed_behind_autograd(net: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        value.data.copy_(state[name])


def changed_by_weights(net: nn.Module, state: dict[str, Tensor]) -> None:
    apply_weights(net, Weights(state, "made up", dict(net.config)))


CHANGES = {
    "load_state_dict": lambda net, state: net.load_state_dict(state),
    "assign": lambda net, state: net.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True),
    "apply_weights": changed_by_weights,
    "in place": changed_in_place,
    "behind autograd": changed_behind_autograd,
}


@pytest.mark.parametrize("change", CHANGES)
def test_folded_weights_are_never_stale(change):
    """After a pass with other values, however the new ones are set; in double precision after ``.double()``."""
    torch.manual_seed(0)
    net, other = deeplabv2("resnet18", 3).train(), randomise_batch_norm(deeplabv2("resnet18", 3))
    images, labels = torch.randn(1, 3, 33, 41), torch.randint(0, 3, (1, 33, 41))
    multi_scale_loss(net, images, labels)["loss"].backward()
    names = set(net.state_dict())
    with torch.inference_mode():
        net.eval()(images)
    CHANGES[change](net.train(), other.state_dict())
    net.zero_grad()
    net.double()
    with torch.inference_mode():  # an evaluation in the middle of a run
        net.eval()(images.double())
    multi_scale_loss(net.train(), images.double(), labels)["loss"].backward()
    found = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    naive_loss(other.double(), images.double(), labels).backward()
    same(found, [parameter.grad for parameter in other.parameters()])
    assert set(net.state_dict()) == names == set(other.state_dict())


def test_a_net_that_began_on_meta():
    with torch.device("meta"):
        net = deeplabv2("resnet18", 3)
        net(torch.zeros(1, 3, 33, 33))
    other = randomise_batch_norm(deeplabv2("resnet18", 3))
    net = net.to_empty(device="cpu")
    net.load_state_dict(other.state_dict())
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        expected = naive_forward(other, images)
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_some_layers_frozen_and_some_not():
    """A net that a user has frozen in part: each batch norm works in its own mode."""
    torch.manual_seed(0)
    net = randomise_batch_norm(deeplabv2("resnet18", 3, batch_norm="full").double())
    twin = randomise_batch_norm(deeplabv2("resnet18", 3).double())
    twin.load_state_dict(net.state_dict(), strict=False)
    net.layer2 = twin.layer2
    images = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images), naive_forward(net, images))


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_a_compiled_net_is_compiled_once(mode):
    """Four steps at three sizes: nothing is compiled after the second, and the gradients equal the eager ones."""
    torch.manual_seed(0)
    net = randomise_batch_norm(deeplabv2("resnet18", 3, batch_norm=mode)).train()
    eager = copy.deepcopy(net)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net.compile(backend=compiler)
    images, labels = torch.randn(2, 3, 65, 73), torch.randint(0, 3, (2, 65, 73))
    for step in range(4):
        for each in (net, eager):
            each.zero_grad()
            multi_scale_loss(each, images, labels)["loss"].backward()
        if step == 1:
            after_two = len(graphs)
    assert after_two == len(graphs) <= 3
    for a, b in zip(net.parameters(), eager.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(b.grad.abs().max()))


# ---- no host sync


@pytest.mark.parametrize("mode", ["frozen", "stats", "full"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_training_step_has_no_host_sync(name, mode, toy_voc, tmp_path, on_meta):
    """In both scripts; only the bytes of the crops are sent, once."""
    options = [*STEP, "--batch-norm", mode, *VARIANTS[name]]
    for script in [train_msc] if "--one-scale-at-a-time" in options else [train, train_msc]:
        strict = on_meta(script, toy_voc, tmp_path / script.__name__, *options)
        assert strict.launches > 100
        batches = 4 if "--iter-size" in options else 2
        assert strict.sent == batches * 2 * 33 * 41 * (
            3 + 1
        )  # two crops per batch, three bytes per pixel and one for the label


def planted_item(losses):
    losses["loss"].item()
    return losses


def planted_cpu(losses):
    losses["loss"].detach().cpu()
    return losses


def planted_constant(losses):
    return {"loss": losses["loss"] * torch.tensor([2.0]).to("meta")[0]}


def planted_mixture(losses):
    return {"loss": losses["loss"][None][torch.tensor([0])][0]}


def planted_number(losses):
    return {"loss": losses["loss"] * torch.tensor(2.0, device="meta")}


@pytest.mark.parametrize("fault", [planted_item, planted_cpu, planted_constant, planted_mixture, planted_number])
def test_planted_faults_in_training_are_noticed(fault, toy_voc, tmp_path, on_meta):
    def loss(*args, **options):
        return fault(single_scale_loss(*args, **options))

    with pytest.raises((AssertionError, RuntimeError, NotImplementedError), match=r"meta|device|host"):
        on_meta(train, toy_voc, tmp_path, *STEP, loss=loss)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scales": (1.0, 0.5), "mirror": True, "batch_size": 2},
        {"canvas": (65, 65)},
        {"window": (33, 33), "scales": (1.0, 0.5), "fuse": "mean"},
    ],
)
def test_prediction_and_counting_have_no_host_sync(options, toy_voc, fake_cuda):
    """Each image is sent as bytes at its own size, with its label."""
    net, strict = fake_cuda
    data, seen = data_of(toy_voc), []
    score.score(net, data, torch.device("cuda"), **options, finish=lambda sample, classes: seen.append(sample.id))
    assert sorted(seen) == sorted(data.ids)
    sizes = [data.load(index)[1].size for index in range(len(data))]
    assert strict.sent == 4 * sum(sizes)


def test_the_device_is_a_batch_ahead(toy_voc, monkeypatch):
    """The results of each batch are read after the next one is launched, and none is lost at the end."""
    order: list[str] = []
    net, data, predict = fold_batch_norm(deeplabv2("resnet18", 4).eval()), data_of(toy_voc), prediction.predict_batch

    def launched(net, images, *args, **options):
        order.extend("launch" for _ in images)
        return predict(net, images, *args, **options)

    monkeypatch.setattr(prediction, "predict_batch", launched)
    options = {"canvas": (65, 65), "batch_size": 2}
    score.score(net, data, torch.device("cpu"), **options, finish=lambda sample, classes: order.append(sample.id))
    ids, go = iter(data.ids), ["launch"] * 2
    assert order == [*go, *go, next(ids), next(ids), *go, next(ids), next(ids), next(ids), next(ids)]


@pytest.mark.parametrize("fault", ["item", "cpu", "constant", "mixture"])
def test_planted_faults_in_prediction_are_noticed(fault, toy_voc, fake_cuda):
    net, _ = fake_cuda
    faults = {
        "item": lambda x: x * x.sum().item(),
        "cpu": lambda x: x.cpu().to(x.device),
        "constant": lambda x: x - torch.ones(4, 1, 1).to(x.device),
        "mixture": lambda x: x[:, torch.arange(4)],
    }
    net.layer5.register_forward_hook(lambda module, args, logits: faults[fault](logits))
    with pytest.raises((AssertionError, RuntimeError), match=r"device|host|_local_scalar_dense"):
        score.score(net, data_of(toy_voc), torch.device("cuda"))
