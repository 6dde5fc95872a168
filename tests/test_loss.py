import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deeplab import LOSS_SIZES, deeplabv2, multi_scale_loss, resize_labels, single_scale_loss
from deeplab.loss import Ohem, cross_entropy
from deeplab.multiscale import fuse_max, resize, scaled_size
from deeplab.weights import ABN, TRUNKS
from tests.helpers_nets import EveryEighth, naive_bilinear
from utils import options


def naive_cross_entropy(logits: np.ndarray, labels: np.ndarray, ignore_label: int = 255, weights=None) -> float:
    """Per image the mean of -log softmax over its labelled pixels, then the mean over the images; one pixel at a time.

    With class weights, the mean is sum(weight * loss) / sum(weight).
    """
    losses = []
    for scores, label in zip(logits, labels):
        pixels, divisor = [], 0.0
        for i in range(label.shape[0]):
            for j in range(label.shape[1]):
                if label[i, j] != ignore_label:
                    z = scores[:, i, j]
                    weight = 1.0 if weights is None else weights[label[i, j]]
                    pixels.append(weight * (math.log(np.exp(z - z.max()).sum()) + z.max() - z[label[i, j]]))
                    divisor += weight
        losses.append(sum(pixels) / divisor if divisor else 0.0)
    return sum(losses) / len(losses)


def test_labels_shrink_to_every_eighth_pixel():
    labels = torch.randint(0, 256, (2, 321, 321))
    assert torch.equal(resize_labels(labels, (41, 41)), labels[:, ::8, ::8])
    assert torch.equal(resize_labels(labels, (321, 321)), labels)
    assert torch.equal(resize_labels(labels, (321, 41)), labels[:, :, ::8])


@pytest.mark.parametrize(("source", "target"), [(321, 31), (10, 4), (320, 41), (5, 1), (1, 1), (1, 3), (4, 9)])
def test_labels_shrink_to_the_nearest_pixel_of_the_aligned_grid(source, target):
    labels = torch.arange(source)[None, None].expand(1, 1, source)
    position = [i * (source - 1) / (target - 1) if target > 1 else 0.0 for i in range(target)]
    expected = [math.floor(p + 0.5) for p in position]
    assert resize_labels(labels, (1, target)).flatten().tolist() == expected


def test_hand_worked_loss():
    """Two classes, logits (0, log 3): probabilities 1/4 and 3/4. One pixel of each class, one ignored."""
    logits = torch.zeros(1, 2, 1, 3)
    logits[:, 1] = math.log(3)
    labels = torch.tensor([[[0, 1, 255]]])
    expected = (math.log(4) + math.log(4 / 3)) / 2
    assert float(cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-6)
    labels[0, 0, 1] = 255  # the mean over one labelled pixel
    assert float(cross_entropy(logits, labels)) == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize("size", LOSS_SIZES)
def test_single_scale_loss_against_a_naive_loop(size):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 33, 41)
    labels = torch.randint(0, 3, (2, 33, 41))
    labels[torch.rand(labels.shape) < 0.3] = 255
    labels[1, 10:] = 255
    loss = single_scale_loss(EveryEighth(), images, labels, size=size)
    assert loss.keys() == {"loss"}
    logits = images[..., ::8, ::8].double().numpy()
    if size == "output":
        expected = naive_cross_entropy(logits, labels[:, ::8, ::8].numpy())
    else:
        large = np.stack([[naive_bilinear(plane, (33, 41)) for plane in image] for image in logits])
        expected = naive_cross_entropy(large, labels.numpy())
    assert float(loss["loss"]) == pytest.approx(expected, rel=1e-5)


def test_multi_scale_loss_is_the_sum_of_four():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 33, 33))
    labels[:, :9] = 255
    losses = multi_scale_loss(EveryEighth(), images, labels)
    expected, at_full_scale = {}, []
    for scale, side, grid in ((1.0, 33, 5), (0.75, 25, 4), (0.5, 17, 3)):
        planes = [[naive_bilinear(plane, (side, side))[::8, ::8] for plane in image] for image in images.numpy()]
        rows = [math.floor(i * 32 / (grid - 1) + 0.5) for i in range(grid)]
        expected[f"loss_{scale:g}x"] = naive_cross_entropy(np.array(planes), labels.numpy()[:, rows][:, :, rows])
        at_full_scale.append([[naive_bilinear(plane, (5, 5)) for plane in image] for image in planes])
    expected["loss_max"] = naive_cross_entropy(np.maximum.reduce(np.array(at_full_scale)), labels[:, ::8, ::8].numpy())
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-5), name
    assert float(losses["loss"]) == pytest.approx(sum(expected.values()), rel=1e-5)
    assert len(losses) == 5


WEIGHTS = torch.tensor([0.25, 3.0, 0.0])


@pytest.mark.parametrize("size", LOSS_SIZES)
def test_class_weights_against_a_naive_loop(size):
    """In every term: each scale, the maximum and the auxiliary head; a class of weight 0 counts for nothing."""
    torch.manual_seed(0)
    images, labels = torch.randn(3, 3, 17, 25), torch.randint(0, 3, (3, 17, 25))
    labels[torch.rand(labels.shape) < 0.3] = 255
    labels[1] = torch.where(labels[1] == 255, 255, 2)  # only weight 0
    labels[2] = 255
    net = TwoHeads()
    main, aux = net(images)

    def naive(logits, grid):
        if size == "input":
            logits, grid = (
                torch.from_numpy(np.array([[naive_bilinear(p, (17, 25)) for p in one.numpy()] for one in logits])),
                labels,
            )
        return naive_cross_entropy(logits.double().numpy(), grid.numpy(), weights=WEIGHTS.tolist())

    single = single_scale_loss(net, images, labels, size, aux_weight=0.4, class_weights=WEIGHTS)
    assert float(single["loss_main"]) == pytest.approx(naive(main, labels[:, ::8, ::8]), rel=1e-5)
    assert float(single["loss_aux"]) == pytest.approx(naive(aux, labels[:, ::8, ::8]), rel=1e-5)
    several = multi_scale_loss(net, images, labels, size, aux_weight=0.4, class_weights=WEIGHTS)
    assert float(several["loss_aux"]) == float(single["loss_aux"])
    assert float(several["loss_1x"]) == float(single["loss_main"])
    first, *others = (net.main(resize(images, scaled_size((17, 25), scale))) for scale in (1.0, 0.75, 0.5))
    assert float(several["loss_max"]) == pytest.approx(naive(fuse_max([first, *others]), labels[:, ::8, ::8]), rel=1e-5)
    for scale, logits in zip(("0.75x", "0.5x"), others):
        expected = naive(logits, resize_labels(labels, logits.shape[-2:]))
        assert float(several[f"loss_{scale}"]) == pytest.approx(expected, rel=1e-5)


def test_class_weights_of_one_change_nothing_and_weights_of_zero_give_zero():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 9, 9, requires_grad=True), torch.randint(0, 3, (2, 9, 9))
    labels[0, 3:] = 255
    for ohem in (None, Ohem(0.4, 5)):
        plain, ones = (cross_entropy(logits, labels, ohem=ohem, class_weights=w) for w in (None, torch.ones(3)))
        assert torch.equal(plain, ones)
        nothing = cross_entropy(logits, torch.full_like(labels, 2), ohem=ohem, class_weights=WEIGHTS)
        nothing.backward(torch.tensor(2.0**16))  # as with fp16 loss scaling
        assert float(nothing.detach()) == 0
        assert not logits.grad.any()


def test_only_ignored_pixels_give_zero_with_a_gradient():
    net = nn.Conv2d(3, 4, 1, stride=8)
    labels = torch.full((2, 17, 17), 255)
    for loss_function in (single_scale_loss, multi_scale_loss):
        net.zero_grad()
        loss = loss_function(net, torch.randn(2, 3, 17, 17), labels)["loss"]
        loss.backward()
        assert loss.item() == 0
        assert net.weight.grad is not None
        assert not net.weight.grad.any()


def test_one_batch_of_four_equals_four_accumulated_batches_of_one():
    """Also if the images have different shares of ignored pixels."""
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3, stride=8, padding=1).double()
    images, labels = torch.randn(4, 3, 33, 33, dtype=torch.float64), torch.randint(0, 4, (4, 33, 33))
    for i in range(4):
        labels[i, : 8 * i] = 255
    whole = torch.autograd.grad(multi_scale_loss(net, images, labels)["loss"], net.weight)[0]
    parts = [
        torch.autograd.grad(multi_scale_loss(net, x[None], y[None])["loss"] / 4, net.weight)[0] for x, y in zip(images, labels)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"'both'.*output, input"):
        cross_entropy(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), size="both")
    assert options.LOSS_SIZES == LOSS_SIZES
    assert (options.TRUNKS, options.ABN) == (TRUNKS, ABN)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("batch_norm", ["frozen", "stats", "full"])
def test_one_scale_at_a_time_is_the_same_step(batch_norm, grad_checkpoint):
    """The same losses, gradients, running statistics and counters."""
    torch.manual_seed(0)
    net = deeplabv2("resnet18", 3, batch_norm=batch_norm).double().train()
    other = copy.deepcopy(net)
    other.grad_checkpoint = grad_checkpoint
    images, labels = torch.randn(2, 3, 33, 41, dtype=torch.float64), torch.randint(0, 3, (2, 33, 41))
    labels[0, :20] = 255
    for _ in range(2):
        losses = multi_scale_loss(net, images, labels)
        (losses["loss"] / 5).backward()
        alone = multi_scale_loss(other, images, labels, one_scale_at_a_time=True)
        (alone["loss"] / 5).backward()
        assert {k: v.item() for k, v in alone.items()} == pytest.approx({k: v.item() for k, v in losses.items()})
    for (name, p), q in zip(net.named_parameters(), other.named_parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for (name, p), q in zip(net.named_buffers(), other.buffers()):
        assert torch.equal(p, q), name


def test_one_scale_at_a_time_keeps_one_scale():
    """Bytes of activations that autograd holds after the forward pass: little more than with the single-scale loss.

    The folded weights are held once in any case, and not counted.
    """

    def kept(loss_function, **options) -> int:
        storages = {}

        def pack(tensor):
            if tensor.shape not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_function(net, images, labels, **options)
        del loss
        return sum(storages.values())

    net = deeplabv2("resnet18", 3).train()
    weights = {parameter.shape for parameter in net.parameters()}
    images, labels = torch.randn(2, 3, 129, 129), torch.randint(0, 3, (2, 129, 129))
    single, alone = kept(single_scale_loss), kept(multi_scale_loss, one_scale_at_a_time=True)
    assert kept(multi_scale_loss) > 1.5 * single
    assert alone < 1.1 * single


# ---- online hard example mining


def naive_ohem(logits: np.ndarray, labels: np.ndarray, threshold: float, keep: int) -> float:
    """By sorting the probabilities of all labelled pixels of the batch, as the toolbox describes it."""
    z = np.moveaxis(logits.astype(np.float64), 1, -1)[labels != 255]
    classes = labels[labels != 255]
    if not len(classes):
        return 0.0
    probability = np.exp(z - z.max(1, keepdims=True))
    probability = (probability / probability.sum(1, keepdims=True))[np.arange(len(classes)), classes]
    limit = max(threshold, np.sort(probability)[min(keep, len(probability)) - 1])
    return float(-np.log(probability[probability <= limit]).mean())


@pytest.mark.parametrize("keep", [1, 7, 400, 100_000])
@pytest.mark.parametrize("threshold", [0.05, 0.7, 1.0])
def test_ohem_against_sorted_probabilities(threshold, keep):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(2, 4, 17, 23), torch.randint(0, 4, (2, 17, 23))
    labels[0, :9] = 255
    for mask in (labels, torch.full_like(labels, 255)):  # some pixels are ignored, or all
        found = cross_entropy(logits, mask, ohem=Ohem(threshold, keep))
        assert float(found) == pytest.approx(naive_ohem(logits.numpy(), mask.numpy(), threshold, keep), rel=1e-5)
    everything = F.cross_entropy(logits, labels, ignore_index=255)
    assert (float(cross_entropy(logits, labels, ohem=Ohem(1.0, 1))) - float(everything)) == pytest.approx(0, abs=1e-6)


def test_ohem_hand_worked():
    """Logits (0, log a) give the second class a / (1 + a): 1/2, 3/4, 9/10 at three pixels; the fourth is ignored."""
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1, 0] = torch.tensor([1.0, 3.0, 9.0, 0.01]).log()
    labels = torch.tensor([[[1, 1, 1, 255]]])
    one = math.log(2)
    two = (math.log(2) + math.log(4 / 3)) / 2
    assert float(cross_entropy(logits, labels, ohem=Ohem(0.7, 1))) == pytest.approx(one, rel=1e-6)
    assert float(cross_entropy(logits, labels, ohem=Ohem(0.7, 2))) == pytest.approx(two, rel=1e-6)
    assert float(cross_entropy(logits, labels, ohem=Ohem(0.8, 1))) == pytest.approx(two, rel=1e-6)
    assert Ohem() == Ohem(threshold=0.7, keep=100_000)  # the toolbox's


def test_ohem_gradient_is_that_of_the_chosen_pixels():
    torch.manual_seed(1)
    logits, labels = torch.randn(1, 3, 5, 5, requires_grad=True), torch.randint(0, 3, (1, 5, 5))
    cross_entropy(logits, labels, ohem=Ohem(0.01, 6)).backward()
    assert int(logits.grad.abs().sum(dim=1).gt(0).sum()) == 6
    nothing = cross_entropy(logits, torch.full_like(labels, 255), ohem=Ohem())
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert bool(logits.grad.isfinite().all())
    broken = logits.detach().clone()
    broken[0, 0, 2, 2] = math.nan
    assert math.isnan(float(cross_entropy(broken, labels, ohem=Ohem(0.01, 6))))  # never dropped silently


def test_ohem_chooses_pixels_regardless_of_weights():
    """Hand-worked: the true classes 1, 0, 1 have probabilities 1/2, 1/4, 9/10; the two hard pixels count, weighted."""
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1, 0] = torch.tensor([1.0, 3.0, 9.0]).log()
    labels = torch.tensor([[[1, 0, 1]]])
    found = cross_entropy(logits, labels, ohem=Ohem(0.7, 1), class_weights=torch.tensor([5.0, 0.5]))
    assert float(found) == pytest.approx((0.5 * math.log(2) + 5 * math.log(4)) / 5.5, rel=1e-6)


class TwoHeads(nn.Module):
    """A net with an auxiliary head, which may be used at the first scale only."""

    def __init__(self):
        super().__init__()
        self.main, self.dsn = EveryEighth(), nn.Identity()
        self.asked = []

    def forward(self, images, auxiliary=None):
        self.asked.append(auxiliary)
        logits = self.main(images)
        return logits if auxiliary is False else (logits, logits.flip(1) / 2)


def test_auxiliary_loss_and_ohem_at_three_scales():
    torch.manual_seed(2)
    images, labels = torch.randn(2, 3, 33, 41), torch.randint(0, 3, (2, 33, 41))
    net, ohem = TwoHeads(), Ohem(0.3, 5)
    losses = multi_scale_loss(net, images, labels, ohem=ohem, aux_weight=0.4)
    assert net.asked == [None, False, False]
    plain = multi_scale_loss(net.main, images, labels, ohem=ohem)
    aux = cross_entropy(net(images)[1], labels)
    assert float(losses["loss"]) == pytest.approx(float(plain["loss"] + 0.4 * aux), rel=1e-6)
    assert {name: float(value) for name, value in losses.items() if name != "loss"} == {
        name: float(value) for name, value in {**plain, "loss_aux": aux}.items() if name != "loss"
    }
    small = resize_labels(labels, (5, 6))
    naive = naive_ohem(net.main(images).numpy(), small.numpy(), 0.3, 5)
    assert float(losses["loss_1x"]) == pytest.approx(naive, rel=1e-5)
    single = single_scale_loss(net, images, labels, ohem=ohem, aux_weight=0.4)
    assert float(single["loss"]) == pytest.approx(naive + 0.4 * float(aux), rel=1e-5)
    net.asked.clear()
    for loss in (single_scale_loss, multi_scale_loss):  # without a weight the auxiliary head is not computed
        found, expected = loss(net, images, labels), loss(net.main, images, labels)
        assert found.keys() == expected.keys()
        assert float(found["loss"]) == float(expected["loss"])
    multi_scale_loss(net, images, labels, one_scale_at_a_time=True)
    assert net.asked == [False] * 7


@pytest.mark.parametrize("loss", [single_scale_loss, multi_scale_loss])
@pytest.mark.parametrize("shape", [(2, 17, 18), (1, 17, 17), (2, 3, 17, 17), (17, 17)])
def test_labels_of_another_size_are_refused(loss, shape):
    with pytest.raises(ValueError, match=r"images \(2, 3, 17, 17\) and labels \(.*\) do not match; expected .* \(N, H, W\)"):
        loss(None, torch.zeros(2, 3, 17, 17), torch.zeros(shape, dtype=torch.long))
