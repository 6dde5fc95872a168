import collections
import json
import os
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from dataset import MEAN_BGR
from deeplab import deeplabv2, make_net
from deeplab.weights import WeightsError, apply_weights, export, load_weights, stem
from deeplab.weights.names import net_shapes
from tests.helpers_published import (
    BN_LEAVES,
    caffe_bytes,
    canonical_modules,
    kazuto_state,
    layer,
    logits,
    narrow_state,
    random_net,
    seeded_and_tidy,  # noqa: F401
    tensorflow_arrays,
)
from tests.helpers_weights import HEAD, load_into_new_net, save


def assert_same_logits(path, source, atol=0.0):
    net, weights, report = load_into_new_net(path, batch_norm="full")
    path.unlink()  # the big ones
    torch.testing.assert_close(logits(net), logits(source), rtol=0, atol=atol)
    assert report.missing == report.unexpected == []
    return weights


# Each scheme: the logits of the loaded net are those of the source net.


def test_published_names(tmp_path):
    source = random_net("resnet50", 5)
    weights = assert_same_logits(save(tmp_path / "VOC12_scenes_20000.pth", dict(source.state_dict())), source)
    assert weights.scheme == "DeepLab-ResNet"
    assert weights.config == {
        "backbone": "resnet50",
        "num_classes": 5,
        "atrous_rates": [6, 12, 18, 24],
        "stride_in_3x3": False,
        "batch_norm_eps": 1e-5,
        "net": "deeplabv2",
        "stem": "7x7",
    }
    assert weights.seen_voc_val == ""


@pytest.mark.parametrize("prefix", ["Scale.", "module.", "module.Scale.", "_orig_mod.module."])
def test_wrapped_and_old_files(tmp_path, prefix):
    source = random_net("resnet18", 3)
    counters = {key for key in source.state_dict() if key.endswith("num_batches_tracked")}
    state = {prefix + key: tensor for key, tensor in source.state_dict().items() if key not in counters}
    path = save(tmp_path / "MS_DeepLab_resnet_trained_VOC.pth", state, _use_new_zipfile_serialization=False)
    weights = assert_same_logits(path, source)
    assert weights.scheme == f"DeepLab-ResNet with the prefix {prefix}"


def test_kazuto_names(tmp_path):
    source = random_net("resnet101")
    state = kazuto_state(source.state_dict(), "resnet101")
    assert len(state) == 632
    weights = assert_same_logits(save(tmp_path / "deeplabv2_resnet101_msc-vocaug-20000.pth", state), source)
    assert weights.scheme == "kazuto1011 DeepLab-v2"
    assert weights.seen_voc_val == ""


def test_kazuto_without_base_and_its_coco_net(tmp_path):
    canonical = narrow_state("resnet101")
    state = kazuto_state(canonical, "resnet101", prefix="")
    weights = load_weights(save(tmp_path / "x.pth", state))
    assert weights.state.keys() == canonical.keys()
    assert all(torch.equal(weights.state[key], tensor) for key, tensor in canonical.items())
    state = {key: tensor for key, tensor in state.items() if "aspp" not in key}
    state |= {"fc.weight": torch.rand(91, 2, 1, 1), "fc.bias": torch.rand(91)}
    weights = load_weights(save(tmp_path / "deeplabv1_resnet101-coco.pth", state))
    assert set(weights.skipped) == {"fc.weight", "fc.bias"}
    assert any("COCO" in note for note in weights.notes)
    assert "num_classes" not in weights.config


def test_official_caffemodel(tmp_path):
    source = random_net("resnet50")
    path = tmp_path / "train2_iter_20000.caffemodel"
    path.write_bytes(caffe_bytes(source.state_dict(), "resnet50", factor=4.0))  # exact in binary
    weights = assert_same_logits(path, source)
    assert weights.scheme == "Caffe DeepLab-v2"
    assert "train and val" in weights.seen_voc_val
    assert any("on val" in line for line in weights.lines())


def test_caffe_tensorflow_dictionary(tmp_path):
    """The converter's output holds Caffe's own arrays, so Caffe's epsilon."""
    source = random_net("resnet50", 4)
    path = tmp_path / "deeplab_resnet.npy"
    np.save(path, tensorflow_arrays(source.state_dict(), "resnet50"))
    weights = assert_same_logits(path, source)
    assert weights.config["batch_norm_eps"] == 1e-5
    assert any("Caffe's own arrays" in note and "1e-05" in note for note in weights.notes)
    assert weights.seen_voc_val


def test_npz_of_tensorflow_variables(tmp_path):
    state = narrow_state("resnet50")
    flat = {f"{layer}/{k}": v for layer, entry in tensorflow_arrays(state, "resnet50").items() for k, v in entry.items()}
    np.savez(tmp_path / "x.npz", **flat, global_step=np.int64(3), **{"conv1/weights/Momentum": flat["conv1/weights"]})
    weights = load_weights(tmp_path / "x.npz")
    assert weights.state.keys() == state.keys()
    assert all(torch.equal(weights.state[key], tensor) for key, tensor in state.items())
    assert set(weights.skipped) == {"global_step", "conv1/weights/Momentum"}
    assert weights.config["batch_norm_eps"] == 1e-3
    assert any("TensorFlow trained" in note and "0.001" in note for note in weights.notes)


@pytest.mark.parametrize(
    ("name", "nested", "eps"), [("x.npz", True, 1e-5), ("x.npy", False, 1e-3), ("deeplab_resnet.npz", False, 1e-5)]
)
def test_epsilon_by_the_form_of_the_arrays(tmp_path, name, nested, eps):
    """Nested dictionaries come from the converter in either container, flat names from a checkpoint; one checkpoint is known
    to be the converter's output."""
    layers = tensorflow_arrays(narrow_state("resnet50"), "resnet50")
    flat = {f"{layer}/{leaf}:0": value for layer, entry in layers.items() for leaf, value in entry.items()}
    if name.endswith(".npy"):
        np.save(tmp_path / name, layers if nested else flat)
    elif nested:
        np.savez(tmp_path / name, arr_0=np.array(layers, dtype=object))
    else:
        np.savez(tmp_path / name, **flat)
    assert load_weights(tmp_path / name).config["batch_norm_eps"] == eps


def test_numpy_pickle_of_python_2(tmp_path):
    """As numpy 1 under Python 2 wrote it: protocol 2, byte strings, numpy.core; spelt out opcode by opcode."""

    def string(text):
        return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<I", len(text)) + text

    def array(shape, dtype, payload):
        head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + string(b"b") + b"\x87R"
        return head + b"(K\x01(" + b"".join(b"K" + bytes([side]) for side in shape) + b"t" + dtype + b"\x89" + payload + b"tb"

    floats = (
        b"cnumpy\ndtype\n"
        + string(b"f4")
        + b"K\0K\x01\x87R(K\x03"
        + string(b"<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    objects = (
        b"cnumpy\ndtype\n"
        + string(b"O8")
        + b"K\0K\x01\x87R(K\x03"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"
    )
    entries = b""
    arrays = tensorflow_arrays(narrow_state("resnet101"), "resnet101")
    for name, entry in arrays.items():
        entries += string(name.encode()) + b"}("
        for leaf, values in entry.items():
            entries += string(leaf.encode()) + array(values.shape, floats, string(values.tobytes()))
        entries += b"u"
    pickled = b"\x80\x02" + array((), objects, b"]" + b"}(" + entries + b"ua") + b"."
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    path = tmp_path / "deeplab_resnet_init.npy"
    path.write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header) + 1) + header + b"\n" + pickled)
    weights = load_weights(path)
    assert len(weights.state) == len(net_shapes("resnet101"))  # a file of this name is known to have a random head
    conv = torch.from_numpy(arrays["res4b22_branch2b"]["weights"]).permute(3, 2, 0, 1)
    assert torch.equal(weights.state["layer3.22.conv2.weight"], conv)
    assert weights.seen_voc_val == ""


class Torch02Pickler(pickle._Pickler):
    """Pickles as Python 2 and PyTorch 0.2 did: byte strings, ``_rebuild_tensor``, storages by a persistent id."""

    def save(self, value, *args, **options):
        if isinstance(value, str):
            self.write(b"U" + bytes([len(value)]) + value.encode())
        else:
            super().save(value, *args, **options)

    def persistent_id(self, value):
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            storage = ("storage", torch.FloatStorage, str(value.data_ptr()), "cuda:0", value.numel(), None)
            return torch._utils._rebuild_tensor, (storage, 0, tuple(value.shape), tuple(value.stride()))
        if isinstance(value, collections.OrderedDict):
            return collections.OrderedDict, ([list(item) for item in value.items()],)
        return NotImplemented


def test_torch_file_of_2017(tmp_path):
    state = collections.OrderedDict(("Scale." + key, tensor) for key, tensor in narrow_state().items())
    path = tmp_path / "VOC12_scenes_16000.pth"
    with open(path, "wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        Torch02Pickler(file, protocol=2).dump(state)
        storages = {str(tensor.data_ptr()): tensor for tensor in state.values()}
        pickle.dump(sorted(storages), file, protocol=2)
        for key in sorted(storages):
            file.write(struct.pack("<q", storages[key].numel()) + storages[key].numpy().tobytes())
    weights = load_weights(path)
    assert weights.scheme == "DeepLab-ResNet with the prefix Scale."
    assert all(torch.equal(weights.state[key.removeprefix("Scale.")], tensor) for key, tensor in state.items())


def test_snapshot_checkpoint_and_safetensors(tmp_path):
    source = random_net("resnet50", 7, stride_in_3x3=True, atrous_rates=(2, 4, 6), batch_norm_eps=1e-4)
    meta = {**source.config, "classes": None, "step": 12, "args": {"seed": 1}, "seen_voc_val": "trained on trainval"}
    content = {"model": source.state_dict(), "meta": meta}
    for path in (
        save(tmp_path / "VOC12_scenes_12.pth", content),
        save(tmp_path / "last.ckpt", content | {"optimizer": {"state": {}}, "step": 12}),
    ):
        weights = assert_same_logits(path, source)
        assert weights.meta == meta
        assert weights.config == source.config
        assert weights.seen_voc_val == "trained on trainval"
    path = tmp_path / "x.safetensors"
    save_file(source.state_dict(), path, {"format": "pt", "meta": json.dumps(meta)})
    assert assert_same_logits(path, source).meta == meta


@pytest.mark.parametrize("form", ["snapshot", "bare", "half", "frozen"])
def test_our_own_files_go_straight(tmp_path, form, monkeypatch):
    """Inside a wrapper the same net is read as a foreign file, with the same result."""
    source = random_net("resnet18", 3, atrous_rates=(2, 4), batch_norm="frozen" if form == "frozen" else "full")
    state = source.state_dict()
    if form == "half":
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    wrapped = {f"module.{key}": value for key, value in state.items()}
    around = load_weights(save(tmp_path / "wrapped.pth", {"model": wrapped, "meta": source.config}))
    save(tmp_path / "x.pth", state if form == "bare" else {"model": state, "meta": source.config})
    monkeypatch.setattr("deeplab.weights.load.from_torch", None)
    straight = load_weights(tmp_path / "x.pth")
    assert (straight.scheme, straight.config, straight.meta) == (around.scheme, around.config, source.config)
    assert straight.state.keys() == around.state.keys()
    assert all(torch.equal(value, around.state[key]) for key, value in straight.state.items())
    assert straight.skipped == {}
    assert straight.notes == []
    assert all(value.dtype in (torch.float32, torch.int64) for value in straight.state.values())


# torchvision


def torchvision_resnet(name):
    """torchvision's own net with random numbers, batch norms included."""
    net = getattr(torchvision.models, name)(weights=None).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, tensor in net.state_dict().items():
            if tensor.ndim == 1 and not key.startswith("fc"):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return net


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_backbone_gives_the_same_features(tmp_path, name):
    source = torchvision_resnet(name)
    net, weights, report = load_into_new_net(save(tmp_path / f"{name}.pth", source.state_dict()))
    net.eval()
    assert weights.config.get("stride_in_3x3", True)
    assert "num_classes" not in weights.config
    assert set(weights.skipped) == {"fc.weight", "fc.bias"}
    assert any("plain image classifier (1000 classes)" in line for line in report.lines())
    assert report.missing == HEAD

    side = 225
    image = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)  # RGB
    rgb = (torch.from_numpy(image).double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    bgr = torch.from_numpy(image[:, :, ::-1].copy()).double() - torch.tensor(MEAN_BGR)
    theirs, ours = (x.permute(2, 0, 1)[None].float() for x in (rgb, bgr))
    with torch.no_grad():
        theirs = torch.relu(source.bn1(source.conv1(theirs)))
        bn = net.bn1
        ours = (net.conv1(ours) - bn.running_mean[:, None, None]) / torch.sqrt(bn.running_var + bn.eps)[:, None, None]
        ours = torch.relu(ours * bn.weight[:, None, None] + bn.bias[:, None, None])
        torch.testing.assert_close(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], rtol=1e-4, atol=1e-4)
        assert (ours - theirs).abs().max() > 1e-3  # the border does differ, so the test can see a difference
        ours, theirs = net.maxpool(ours), source.maxpool(theirs)
        ours, theirs = net.layer2(net.layer1(ours)), source.layer2(source.layer1(theirs))
    assert ours.shape == theirs.shape
    middle = (..., slice(11, -11), slice(11, -11))  # beyond the reach of the border
    scale = theirs[middle].abs().max()
    torch.testing.assert_close(ours[middle] / scale, theirs[middle] / scale, rtol=0, atol=1e-5)


def test_all_stages_of_torchvision_with_our_dilations(tmp_path):
    source = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, True, True]).eval()
    for stage, dilation in ((source.layer3, 2), (source.layer4, 4)):
        stage[0].conv2.dilation = stage[0].conv2.padding = (dilation, dilation)
    source.maxpool.ceil_mode = True
    weights = load_weights(save(tmp_path / "x.pth", source.state_dict()))
    net = make_net(weights.config).eval()
    apply_weights(net, weights)
    x = torch.rand(1, 64, 15, 17)
    y = x
    with torch.no_grad():
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            x, y = getattr(net, stage)(x), getattr(source, stage)(y)
    scale = y.abs().max()
    torch.testing.assert_close(x / scale, y / scale, rtol=0, atol=1e-5)


def test_the_converted_stem_is_rounded_once():
    """Compared with exact fractions."""
    from fractions import Fraction

    weight = torch.rand(2, 3, 7, 7) - 0.5
    turned, mean = stem.to_bgr_input(weight, torch.tensor([0.25, -3.0]))
    std = [Fraction(255 * s) for s in (0.229, 0.224, 0.225)]
    for b, r in ((0, 2), (1, 1), (2, 0)):
        exact = np.float32(float(Fraction(weight[1, r, 3, 4].item()) / std[r]))
        assert turned[1, b, 3, 4].item() == exact
    constant = [104.00698793 - 255 * 0.406, 116.66876762 - 255 * 0.456, 122.67891434 - 255 * 0.485]
    assert constant == pytest.approx([0.477, 0.389, -0.996], abs=1e-3)
    expected = -3.0 - sum(turned[1, b].double().sum().item() * constant[b] for b in range(3))
    assert mean[1].item() == pytest.approx(expected, rel=1e-6)
    assert stem.MEAN_BGR == MEAN_BGR


# What is refused, and how.


def refuse_net(tmp_path, state, match):
    with pytest.raises(WeightsError, match=match):
        load_weights(save(tmp_path / "x.pth", state))


def test_nets_that_cannot_fit(tmp_path):
    deep_stem = narrow_state(head=0) | {"conv1.weight": torch.rand(64, 3, 3, 3), "conv2.weight": torch.rand(64, 64, 3, 3)}
    refuse_net(tmp_path, deep_stem, "64x3x3x3; expected 64x3x7x7, or 64x3x3x3 and conv2 and conv3 after it")
    grey = narrow_state(head=0) | {"conv1.weight": torch.rand(64, 1, 7, 7)}
    refuse_net(tmp_path, grey, "its first convolution is 64x1x7x7; expected 64x3x7x7")
    refuse_net(tmp_path, {"features.0.weight": torch.rand(1)}, r"its keys \(features\.0\.weight\) match no known scheme")
    refuse_net(tmp_path, {"step": 3}, r"holds no tensors under the names of parameters \(step\)")
    refuse_net(tmp_path, torch.rand(3), "it holds a Tensor; expected a state_dict")
    shallow = {key: value for key, value in narrow_state().items() if not key.startswith("layer3.22")}
    refuse_net(tmp_path, shallow, "3, 4, 22, 3 bottleneck blocks in its four stages, which fits none")
    headless = {key: value for key, value in narrow_state().items() if key != "layer5.conv2d_list.2.bias"}
    refuse_net(tmp_path, headless, r"lacks layer5\.conv2d_list\.2\.bias")
    uneven = narrow_state() | {"layer5.conv2d_list.2.bias": torch.rand(20)}
    refuse_net(tmp_path, uneven, r"disagree on the number of classes \(20, 21\)")
    wrong = {"model": narrow_state(), "meta": {"backbone": "resnet101", "num_classes": 5}}
    refuse_net(tmp_path, wrong, "its meta says num_classes 5, but its tensors are those of num_classes 21")
    wrong["meta"] = {"backbone": "resnet50"}
    refuse_net(tmp_path, wrong, "its meta says backbone resnet50")
    wrong["meta"] = {"backbone": "resnet101", "atrous_rates": [6, 12]}
    refuse_net(tmp_path, wrong, r"rates \[6, 12\], but its head has 4 convolutions")


class Evil:
    def __reduce__(self):
        return os.system, ("echo loaded > evil.txt",)


def test_pickles_that_would_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        save("x.pth", {"state_dict": {}, "args": Evil()}, _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError, match=r"holds Python objects \((posix|nt)\.system\) besides tensors"):
            load_weights("x.pth")
    np.save("x.npy", {"conv1": {"weights": Evil()}})
    with pytest.raises(WeightsError, match=r"its pickle holds (posix|nt)\.system; only dictionaries of numpy arrays"):
        load_weights("x.npy")
    np.savez("x.npz", arr_0=np.array({"conv1": Evil()}, dtype=object))
    with pytest.raises(WeightsError, match="only dictionaries of numpy arrays"):
        load_weights("x.npz")
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "it is empty"),
        (b"\0" * 5000, "begins with nothing but zeros"),
        (b"<!DOCTYPE html><html>Google Drive can't scan this file", "it is a web page, not weights"),
        (b"\n  <html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"hello, this is no weights file", r"begins with 'hello, this '"),
        (b"\x1f\x8b\x08" + b"x" * 50, "gzip archive; unpack it"),
        (b"x" * 257 + b"ustar" + b"x" * 50, "cut off or damaged .*truncated header"),
        (b"variables" * 9 + bytes.fromhex("57fb808b247547db"), "TensorFlow checkpoint, which only TensorFlow reads"),
        (b"PK\x03\x04" + b"x" * 90, "cut off or damaged .*zip file"),
        (b"\x93NUMPY\x01\0" + b"\x10\0" + b"{'descr': '<f4',", "cut off or damaged"),
        (bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"junk", "cut off or damaged"),
        ((9).to_bytes(8, "little") + b'{"a":12}  ', "cut off or damaged"),
    ],
)
def test_files_that_are_no_weights(tmp_path, content, match):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=match) as caught:
        load_weights(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_missing_and_other_paths(tmp_path):
    with pytest.raises(
        WeightsError, match=re.escape(f"{tmp_path / 'no.pth'}: there is no such file; `python scripts/download.py")
    ):
        load_weights(tmp_path / "no.pth")
    with pytest.raises(WeightsError, match="it is a folder"):
        load_weights(tmp_path)
    (tmp_path / "model.ckpt.index").write_bytes(b"x")
    with pytest.raises(WeightsError, match="TensorFlow checkpoint"):
        load_weights(tmp_path / "model.ckpt")
    with zipfile.ZipFile(tmp_path / "prototxt_and_model.zip", "w") as archive:
        archive.writestr("init.caffemodel", b"x")
    with pytest.raises(WeightsError, match=r"zip archive \(init\.caffemodel\); unpack it"):
        load_weights(tmp_path / "prototxt_and_model.zip")


def test_truncated_files_of_every_kind(tmp_path):
    state = narrow_state("resnet18")
    save(tmp_path / "new.pth", state)
    save(tmp_path / "old.pth", state, _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "x.safetensors")
    np.save(tmp_path / "x.npy", tensorflow_arrays(narrow_state("resnet50"), "resnet50"))
    np.savez(tmp_path / "x.npz", a=np.ones(999))
    (tmp_path / "x.caffemodel").write_bytes(caffe_bytes(narrow_state(), "resnet101") + layer("last", "Scale", b"\x2a\x01"))
    for path in list(tmp_path.iterdir()):
        data = path.read_bytes()
        for length in (len(data) // 3, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(WeightsError) as caught:
                load_weights(path)
            assert str(caught.value).count("\n") == 0, caught.value


def test_backbone_names_and_shapes_are_those_of_torchvision():
    for backbone in ("resnet18", "resnet50", "resnet101", "resnet152"):
        with torch.device("meta"):
            theirs = getattr(torchvision.models, backbone)().state_dict()
        theirs = {k: tuple(v.shape) for k, v in theirs.items() if not k.startswith("fc.") and "num_batches" not in k}
        assert net_shapes(backbone) == theirs
        names = {f"{m}.{leaf}" for m, bn in canonical_modules(backbone) for leaf in (BN_LEAVES if bn else ("weight",))}
        assert names == set(theirs)


def test_exports_are_refused_in_words(tmp_path):
    def reason(scheme, state, **config):
        meta = {"backbone": "resnet50", "stride_in_3x3": False, "batch_norm_eps": 1e-5} | config
        weights = load_weights(save(tmp_path / "x.pth", {"model": state, "meta": meta}))
        with pytest.raises(WeightsError) as caught:
            export(weights, scheme)
        return str(caught.value)

    with torch.device("meta"):
        real = deeplabv2("resnet50").state_dict()
    real = {key: torch.zeros(()).expand(value.shape) for key, value in real.items()}
    backbone = {key: value for key, value in real.items() if "layer5" not in key}
    for scheme in ("published", "kazuto"):
        assert "epsilon is 0.001, not 1e-05" in reason(scheme, real, batch_norm_eps=1e-3)
        assert "stride sits in the 3x3" in reason(scheme, real, stride_in_3x3=True)
        assert "it has no head" in reason(scheme, backbone)
        assert "rates [1, 2, 3, 4], not [6, 12, 18, 24]" in reason(scheme, real, atrous_rates=[1, 2, 3, 4])
    assert "first 1x1 convolutions, not in the 3x3" in reason("torchvision-trunk", real)
    assert "missing or misshapen, such as" in reason("published", narrow_state("resnet50"))
    real["layer5.conv2d_list.3.weight"] = torch.zeros(()).expand(21, 512, 3, 3)
    assert "layer5.conv2d_list.3.weight takes 512 channels, the backbone gives 2048" in reason("published", real)
