import pytest
import torch

from deeplab import deeplabv2
from utils.training.optimizer import GuardedSGD, clip_gradients, poly_lr, set_lr


def test_poly_schedule_by_hand():
    assert poly_lr(2.5e-4, 0, 20000) == 2.5e-4
    assert poly_lr(2.5e-4, 10000, 20000, 1.0) == 1.25e-4
    assert poly_lr(1.0, 9, 10, 0.9) == pytest.approx(10**-0.9)
    assert poly_lr(1.0, 3, 4, 2.0) == 0.0625
    assert poly_lr(1.0, 1, 2) == 0.5**0.9


def test_warm_up_by_hand():
    """Over 4 of 10 steps: a quarter, a half, three quarters, all. Then the poly schedule only, as with 0 steps of warm-up."""
    plain = [(1 - step / 10) ** 2 for step in range(10)]
    expected = [0.25 * plain[0], 0.5 * plain[1], 0.75 * plain[2], *plain[3:]]
    assert [poly_lr(1.0, step, 10, 2.0, 4) for step in range(10)] == pytest.approx(expected)
    assert [poly_lr(1.0, step, 10, 2.0, 0) for step in range(10)] == plain


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize(("largest", "factor"), [(2.6, 0.2), (13.0, 1.0), (1e9, 1.0)])
def test_clipping_by_hand(scale, largest, factor):
    """Gradients of 3, 4 and 12 have a total norm of 13; they are unscaled first."""
    net = deeplabv2("resnet18", 2)
    optimizer = GuardedSGD(net, lr=1.0, momentum=0.0, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    scaler.scale(torch.zeros(()))  # creates the scale, as scaling the loss does
    set_lr(optimizer, 1.0)
    conv = net.layer5.conv2d_list[0]
    watched = {net.conv1.weight: (3.0, 1), conv.weight: (4.0, 10), conv.bias: (12.0, 20)}
    before = [parameter.detach().clone() for parameter in watched]
    for parameter, (gradient, _) in watched.items():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.view(-1)[0] = gradient * scale
    clip_gradients(optimizer, scaler, largest)
    scaler.step(optimizer)
    for (parameter, (gradient, group)), old in zip(watched.items(), before):
        moved = (old - parameter.detach()).view(-1)
        assert float(moved[0]) == pytest.approx(factor * gradient * group, rel=1e-5)
        assert not moved[1:].any()


@pytest.mark.parametrize("mode", ["frozen", "stats", "full"])
def test_groups_are_the_published_ones(mode):
    net = deeplabv2("resnet18", 3, batch_norm=mode)
    groups = GuardedSGD(net, lr=1.0, weight_decay=5e-4).param_groups
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [(1, 5e-4), (10, 5e-4), (20, 0)]
    backbone, weights, biases = ({id(p) for p in g["params"]} for g in groups)
    assert weights == {id(conv.weight) for conv in net.layer5.conv2d_list}
    assert biases == {id(conv.bias) for conv in net.layer5.conv2d_list}
    assert backbone | weights | biases == {id(p) for p in net.parameters() if p.requires_grad}
    convolutions = 20  # of ResNet-18: 17 of 3x3 and 7x7, 3 projections
    assert len(backbone) == convolutions * (3 if mode == "full" else 1)


def test_published_momentum_and_decay():
    group = GuardedSGD(deeplabv2("resnet18", 2), lr=1.0).param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)


def test_three_steps_of_sgd_by_hand():
    """Momentum buffer v <- 0.9 v + (g + decay w), then w <- w - lr v, with each group's multiple of the learning rate."""
    net = deeplabv2("resnet18", 2)
    optimizer = GuardedSGD(net, lr=1.0, momentum=0.9, weight_decay=0.1)
    conv = net.layer5.conv2d_list[0]
    watched = [(net.conv1.weight, 1, 0.1), (conv.weight, 10, 0.1), (conv.bias, 20, 0.0)]
    expected = [(p.detach().clone().double(), torch.zeros_like(p, dtype=torch.float64)) for p, _, _ in watched]
    for step in range(3):
        lr = poly_lr(0.01, step, 3)
        set_lr(optimizer, lr)
        for k, (parameter, scale, decay) in enumerate(watched):
            parameter.grad = torch.full_like(parameter, 0.5 - step)
            value, velocity = expected[k]
            velocity = 0.9 * velocity + (0.5 - step) + decay * value
            expected[k] = (value - lr * scale * velocity, velocity)
        optimizer.step()
    for (parameter, _, _), (value, _) in zip(watched, expected):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_skipped_step_changes_nothing(momentum):
    """Neither a skipped first step, after which the momentum could be uninitialised memory, nor a later one."""
    nets = [deeplabv2("resnet18", 2), deeplabv2("resnet18", 2)]
    nets[1].load_state_dict(nets[0].state_dict())
    guarded, plain = (
        GuardedSGD(nets[0], 0.1, momentum),
        torch.optim.SGD(nets[1].parameter_groups(), 0.1, momentum, weight_decay=5e-4),
    )
    plain.param_groups[2]["weight_decay"] = 0.0
    for bad in (True, False, True, False, False):
        for net in nets:
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, float("nan") if bad else 0.25)
        guarded.bad = torch.tensor(float(bad))
        guarded.step()
        if not bad:
            plain.step()
    for (name, ours), theirs in zip(nets[0].named_parameters(), nets[1].parameters()):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


def test_loss_scaling_and_the_guard_both_skip_steps():
    net = deeplabv2("resnet18", 2)
    optimizer = GuardedSGD(net, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = net.layer5.conv2d_list[0].weight
    start = weight.detach().clone()
    for bad, gradient in ((0.0, float("inf")), (1.0, 1.0), (0.0, 1.0)):
        scaler.scale(torch.zeros(()))  # creates the scale; the gradients are set below
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, gradient * scaler.get_scale())
        optimizer.bad = torch.tensor(bad)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, start) == (bad > 0 or gradient != 1.0)
    torch.testing.assert_close(weight.detach(), start - 0.1 * (1.0 + 5e-4 * start))
