"""DeepLabv3 and PSPNet through the commands: defaults, dropout, resume, evaluation, what is refused."""

import os
import signal
from argparse import Namespace

import pytest
import torch

import evaluate as evaluate_script
import train_msc as train_msc_script
from deeplab import load_net, make_net, multi_scale_loss, single_scale_loss
from deeplab.weights import load_weights
from tests.conftest import TOY_CLASSES
from tests.test_training import SMALL, log_lines, model, train
from utils.checked_options import check_net_options
from utils.command import UserError
from utils.training import seed_dropout

NONE = ["--restore-from", "none", "--num-steps", "2"]


def test_the_net_says_its_defaults_and_options_win(toy_voc, tmp_path):
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
    first = log_lines(tmp_path / "b")[0]
    assert first["loss"] == first["loss_main"]
    train(toy_voc, tmp_path / "c", *NONE, "--restore-from", str(tmp_path / "a/VOC12_scenes_2.pth"))  # the file says what it is
    meta = load_weights(tmp_path / "c/VOC12_scenes_2.pth").meta
    assert (meta["net"], meta["args"]["learning_rate"]) == ("deeplabv3", 1e-2)


def stopping(batches):
    """A loss that stops the run during its n-th batch."""
    seen = []

    def loss(*args, **options):
        seen.append(0)
        if len(seen) == batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return single_scale_loss(*args, **options)

    loss.__name__ = "single_scale_loss"
    return loss


def test_dropout_of_a_resumed_run_is_that_of_a_whole_one(toy_voc, tmp_path):
    run = ["--net", "pspnet", "--restore-from", "none", "--num-steps", "3", "--iter-size", "2", "--random-mirror"]
    train(toy_voc, tmp_path / "whole", *run)
    assert train(toy_voc, tmp_path / "parts", *run, loss=stopping(3)) == 128 + signal.SIGTERM
    torch.manual_seed(99)
    train(toy_voc, tmp_path / "parts", "--resume")
    whole, parts = (model(tmp_path / name / "VOC12_scenes_3.pth") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_each_batch_of_each_process_draws_its_own(monkeypatch):
    drawn = set()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for step in range(3):
            for batch in (1, 2):
                seed_dropout(1234, step, batch)
                drawn.add(tuple(torch.rand(4).tolist()))
                seed_dropout(1234, step, batch)
                assert tuple(torch.rand(4).tolist()) in drawn
    assert len(drawn) == 12
    seed_dropout(2**63 - 1, 0, 1)


def test_one_scale_at_a_time_drops_the_same_channels_again():
    """What is computed again in the backward pass is the same net, whose dropout drew what it drew the first time."""
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
        (["--aux-weight", "0.4"], "--aux-weight is of an auxiliary head, which deeplabv2 has none of"),
        (["--ohem-keep", "5"], "--ohem-keep says how --ohem chooses"),
        (["--net", "pspnet", "--batch-size", "1"], "give pspnet at least two pictures a process"),
    ],
)
def test_what_does_not_go_together_is_refused(options, words, toy_voc, tmp_path):
    with pytest.raises(UserError, match=words):
        train(toy_voc, tmp_path / "run", *NONE, *options)
    assert not (tmp_path / "run").exists()


def test_shared_statistics_need_some():
    args = Namespace(sync_bn=True, batch_norm="frozen", net="deeplabv2", batch_size=2)
    with pytest.raises(UserError, match="add --batch-norm full"):
        check_net_options(args)


def test_rates_are_those_of_deeplabv2(toy_voc, tmp_path):
    with pytest.raises(ValueError, match="--atrous-rates are those of DeepLab-v2's head; a pspnet has none"):
        train(toy_voc, tmp_path / "run", *NONE, "--net", "pspnet", "--atrous-rates", "6,12")
    assert (
        train_msc_script.main(["--data-dir", str(toy_voc), "--snapshot-dir", str(tmp_path / "m"), *SMALL, *NONE, "--ohem"]) == 0
    )
