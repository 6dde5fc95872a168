"""DeepLabv3 and PSPNet through the commands: defaults, dropout, resume, evaluation, refused options."""

import os
import signal
from functools import wraps

import pytest
import torch

import evaluate as evaluate_script
import train_msc as train_msc_script
from deeplab import NETS, load_net, make_net, multi_scale_loss, single_scale_loss
from deeplab.toolbox import ChannelDropout
from deeplab.weights import load_weights
from tests.helpers import TOY_CLASSES
from tests.helpers_runs import SMALL, log_lines, model, train
from utils.command import UserError
from utils.options import Options
from utils.training.identity import kept_options, resumed_options
from utils.training.loop import seed_dropout
from utils.training.options import check_net_options, settle, training_parser

pytestmark = pytest.mark.usefixtures("thin_nets")
NONE = ["--restore-from", "none", "--num-steps", "2"]


def test_given_options_override_the_defaults_of_the_net(toy_voc, tmp_path):
    train(toy_voc, tmp_path / "a", "--net", "deeplabv3", *NONE, "--ohem", "--ohem-keep", "50")
    meta = load_weights(tmp_path / "a/VOC12_scenes_2.pth").meta
    args = meta["args"]
    assert (meta["net"], meta["stem"], meta["stride_in_3x3"]) == ("deeplabv3", "deep", True)
    assert (args["learning_rate"], args["loss_size"], args["batch_norm"], args["aux_weight"]) == (1e-2, "input", "full", 0.4)
    assert args["weight_decay"] == 5e-4
    first = log_lines(tmp_path / "a")[0]
    assert first["loss"] == pytest.approx(first["loss_main"] + 0.4 * first["loss_aux"], rel=1e-4)
    assert first["lr"] == 1e-2
    options = ["--learning-rate", "1e-3", "--loss-size", "output", "--aux-weight", "0", "--batch-norm", "frozen"]
    train(toy_voc, tmp_path / "b", "--net", "pspnet", *NONE, *options)
    args = load_weights(tmp_path / "b/VOC12_scenes_2.pth").meta["args"]
    assert (args["learning_rate"], args["loss_size"], args["batch_norm"], args["aux_weight"]) == (1e-3, "output", "frozen", 0)
    assert not {"loss_main", "loss_aux"} & log_lines(tmp_path / "b")[0].keys()
    train(toy_voc, tmp_path / "c", *NONE, "--restore-from", str(tmp_path / "a/VOC12_scenes_2.pth"))  # the file says its net
    meta = load_weights(tmp_path / "c/VOC12_scenes_2.pth").meta
    assert (meta["net"], meta["args"]["learning_rate"]) == ("deeplabv3", 1e-2)


@pytest.mark.parametrize(("batch_size", "iter_size"), [(10, 1), (1, 10)])
def test_published_values_for_the_nets_on_cityscapes(batch_size, iter_size):
    """Those of the toolbox: batch 8, 40,000 steps, crops of 769, scales 0.7 to 2.1. Given or resumed options override them."""

    def settled(*words: str) -> Options:
        parser = training_parser("", batch_size=batch_size, iter_size=iter_size, snapshot_dir="snapshots")
        return settle(parser.parse_args(list(words)))

    def values(args: Options) -> tuple:
        return args.batch_size, args.iter_size, args.num_steps

    for net in sorted(NETS.keys() - {"deeplabv2"}):
        args = settled("--dataset", "cityscapes", "--net", net)
        assert values(args) == (8, 1, 40_000)
        assert (args.input_size, args.scale_range, args.ohem_threshold, args.ohem_keep) == (
            (769, 769),
            (0.7, 2.1),
            0.7,
            100_000,
        )
        given = ["--batch-size", "4", "--iter-size", "2", "--num-steps", "7"]
        assert values(settled("--dataset", "cityscapes", "--net", net, *given)) == (4, 2, 7)
        assert values(settled("--net", net)) == (batch_size, iter_size, 20_000)
    args = settled("--dataset", "cityscapes", "--net", "pspnet", "--resume")
    begun = {**kept_options(args), "batch_size": 10, "iter_size": 1, "num_steps": 20_000}
    options, _ = resumed_options(args, {"args": begun, "net": "pspnet"}, 5, begun.get("loss", "single_scale_loss"))
    assert values(options) == (10, 1, 20_000)
    for words in (["--dataset", "cityscapes"], ["--dataset", "cityscapes", "--net", "deeplabv2"]):
        assert values(settled(*words)) == (batch_size, iter_size, 20_000)


def stopping(batches):
    """A loss that stops the run in its ``batches``-th batch."""
    seen = []

    @wraps(single_scale_loss)
    def loss(*args, **options):
        seen.append(0)
        if len(seen) == batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return single_scale_loss(*args, **options)

    return loss


def test_dropout_of_a_resumed_run_is_that_of_an_uninterrupted_run(toy_voc, tmp_path):
    run = ["--net", "pspnet", "--restore-from", "none", "--num-steps", "3", "--iter-size", "2", "--random-mirror"]
    train(toy_voc, tmp_path / "whole", *run)
    assert train(toy_voc, tmp_path / "parts", *run, loss=stopping(3)) == 128 + signal.SIGTERM
    torch.manual_seed(99)
    train(toy_voc, tmp_path / "parts", "--resume")
    whole, parts = (model(tmp_path / name / "VOC12_scenes_3.pth") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_dropout_differs_between_batches_but_not_between_processes(monkeypatch):
    drawn = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for step in range(3):
            for batch in (1, 2):
                seed_dropout(1234, step, batch)
                numbers = tuple(torch.rand(4).tolist())
                assert drawn.setdefault((step, batch), numbers) == numbers
    assert len(set(drawn.values())) == 6
    seed_dropout(2**63 - 1, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_an_image_does_not_depend_on_the_number_of_processes(dtype):
    x, whole = torch.rand(6, 400, 2, 3).to(dtype) + 1, ChannelDropout(0.1)
    torch.manual_seed(5)
    expected = whole(x)
    kept = (expected != 0).all(dim=(2, 3))
    assert torch.equal(kept, (expected != 0).any(dim=(2, 3)))  # whole channels
    assert 0.87 < float(kept.float().mean()) < 0.93
    torch.testing.assert_close(expected, torch.where(kept[:, :, None, None], x / 0.9, torch.zeros_like(x)))
    for processes in (2, 3):
        for number, part in enumerate(x.split(6 // processes)):
            mine = ChannelDropout(0.1)
            mine.shard = (number, processes)
            torch.manual_seed(5)
            assert torch.equal(mine(part), expected.chunk(processes)[number])
            assert mine.eval()(part) is part


def test_an_auxiliary_head_with_weight_0_is_not_trained(toy_voc, tmp_path):
    """Its tensors keep their initial values. They are in the optimiser's state, and the run can be resumed."""
    options = [*NONE, "--net", "pspnet", "--aux-weight", "0", "--save-pred-every", "1"]
    train(toy_voc, tmp_path, *options)
    first, second = (model(tmp_path / f"VOC12_scenes_{step}.pth") for step in (1, 2))
    for key, value in first.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, second[key]) == key.startswith("dsn"), key
    momentum = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer"]["state"]
    assert len(momentum) == len(list(load_net(tmp_path / "VOC12_scenes_2.pth", "full").parameters()))
    train(toy_voc, tmp_path, "--resume", "--num-steps", "3")


def test_one_scale_at_a_time_drops_the_same_channels_again():
    """The recomputation in the backward pass drops the same channels as the forward pass."""
    torch.manual_seed(0)
    net = make_net({"net": "deeplabv3", "backbone": "resnet18", "num_classes": 3}, "frozen").train()
    dropped: dict[tuple, list] = {}
    net.head[0].bottleneck[2].register_forward_hook(
        lambda module, inputs, y: dropped.setdefault(tuple(y.shape[2:]), []).append((y.detach() == 0).all(dim=(2, 3)))
    )
    images, labels = torch.randn(2, 3, 33, 33), torch.randint(0, 3, (2, 33, 33))
    multi_scale_loss(net, images, labels, one_scale_at_a_time=True)["loss"].backward()
    assert {size: len(masks) for size, masks in dropped.items()} == {(5, 5): 1, (4, 4): 2, (3, 3): 2}
    for masks in dropped.values():
        assert bool(masks[0].any())
        assert torch.equal(masks[0], masks[-1])
    assert not torch.equal(dropped[4, 4][0], dropped[3, 3][0])


def test_evaluation_and_prediction_take_the_net_from_the_snapshot(toy_voc, tmp_path, capsys):
    train(toy_voc, tmp_path / "run", "--net", "pspnet", *NONE)
    snapshot = str(tmp_path / "run/VOC12_scenes_2.pth")
    common = ["--data-dir", str(toy_voc), "--restore-from", snapshot, "--device", "cpu", "--num-workers", "0"]
    assert evaluate_script.main([*common, "--scales", "1,0.5"]) == 0
    assert "mean IoU" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds the head of a pspnet, which --net deeplabv3 cannot use"):
        evaluate_script.main([*common, "--net", "deeplabv3"])
    assert load_net(snapshot)(torch.zeros(1, 3, 33, 41)).shape == (1, TOY_CLASSES, 5, 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--aux-weight", "0.4"], "--aux-weight is for an auxiliary head, but deeplabv2 has none"),
        (["--ohem-keep", "5"], "--ohem-keep does nothing without --ohem"),
        (["--net", "pspnet", "--batch-size", "1"], "give pspnet at least two"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words, toy_voc, tmp_path):
    with pytest.raises(UserError, match=words):
        train(toy_voc, tmp_path / "run", *NONE, *options)
    assert not (tmp_path / "run").exists()


def test_sync_bn_with_frozen_batch_norm_is_refused():
    args = Options({"sync_bn": True, "batch_norm": "frozen", "net": "deeplabv2", "batch_size": 2})
    with pytest.raises(UserError, match="add --batch-norm full"):
        check_net_options(args)


def test_atrous_rates_are_only_for_deeplabv2(toy_voc, tmp_path):
    with pytest.raises(ValueError, match="--atrous-rates are those of DeepLab-v2's head; leave the option out"):
        train(toy_voc, tmp_path / "run", *NONE, "--net", "pspnet", "--atrous-rates", "6,12")
    assert (
        train_msc_script.main(["--data-dir", str(toy_voc), "--snapshot-dir", str(tmp_path / "m"), *SMALL, *NONE, "--ohem"]) == 0
    )
