"""Weights files as bytes: damage, checksums, nested dictionaries, and files that are not weights."""

import collections
import contextlib
import gzip
import io
import json
import pickle
import re
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deeplab.weights import WeightsError, check_sums, load_weights
from deeplab.weights.read import damaged, read_numpy
from deeplab.weights.weights import Weights, some
from tests.helpers_legacy_tar import tar_torch
from tests.helpers_published import caffe_bytes, narrow_state, seeded_and_tidy, tensorflow_arrays  # noqa: F401


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


def assert_loads(path, state):
    weights = load_weights(path)
    assert weights.state.keys() == state.keys()
    assert all(torch.equal(weights.state[key], tensor) for key, tensor in state.items())
    return weights


def refused(path, match):
    with pytest.raises(WeightsError, match=match) as caught:
        load_weights(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 600
    return text


# Checksums


def test_a_directory_of_more_members_than_its_counter_holds(tmp_path):
    """The counter of a zip file has two bytes, and 65,535 means "look elsewhere" (PKWARE APPNOTE 4.4.1.4)."""
    with zipfile.ZipFile(tmp_path / "many", "w") as archive:
        for number in range(65_536):
            archive.writestr(zipfile.ZipInfo(str(number)), b"")
    assert check_sums(tmp_path / "many") == ""


def test_long_errors_of_readers_are_cut():
    assert damaged(ValueError("x" * 200 + "\nmore")).count("x") == 120
    assert damaged(ValueError()) == "it is cut off or damaged (ValueError); fetch or copy it again"


def test_a_few_names_and_how_many_more():
    assert [some("abcdefg"[:count]) for count in (1, 6, 7)] == ["a", "a, b, c, d, e, f", "a, b, c, d, e, f and 1 more"]


def flip_a_bit(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(bytes(data))


def offset_of(path, member):
    """The offset of a member's bytes (PKWARE APPNOTE 4.3.7: a header of 30 bytes, the name and the extra field)."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(member).header_offset
    name, extra = struct.unpack("<HH", data[start + 26 : start + 30])
    return start + 30 + name + extra


@pytest.mark.parametrize("kind", ["published", "snapshot", "npz", "npz compressed"])
def test_one_flipped_bit_in_a_zip_file_is_found(tmp_path, kind):
    state = narrow_state("resnet50")
    if kind.startswith("npz"):
        path = tmp_path / "x.npz"
        layers = tensorflow_arrays(state, "resnet50")
        arrays = {f"{layer}/{leaf}": value for layer, entry in layers.items() for leaf, value in entry.items()}
        (np.savez_compressed if kind.endswith("compressed") else np.savez)(path, **arrays)
        member = "res3a_branch2a/weights.npy"
    else:
        content = state if kind == "published" else {"model": state, "meta": {"backbone": "resnet50"}}
        path, member = save(tmp_path / "x.pth", content), "x/data/7"
    assert check_sums(path) == ""
    assert_loads(path, state)
    flip_a_bit(path, offset_of(path, member) + 3)
    refused(path, f"damaged.*{member if kind != 'npz compressed' else ''}.*fetch or copy it again")
    with pytest.raises(WeightsError, match="damaged"):
        check_sums(path)


def test_a_zeroed_page_is_found_at_any_offset(tmp_path):
    whole = save(tmp_path / "whole.pth", narrow_state("resnet18") | {"layer4.1.bn2.weight": torch.rand(5000)}).read_bytes()
    path = tmp_path / "x.pth"
    for start in range(0, len(whole), 4096):
        path.write_bytes(whole[:start] + bytes(len(whole[start : start + 4096])) + whole[start + 4096 :])
        refused(path, "fetch or copy it again")


def test_a_torch_file_without_checksums_is_read_with_a_note(tmp_path):
    state = narrow_state("resnet18")
    path = save(tmp_path / "x.pth", state)
    data = bytearray(path.read_bytes())
    for part in re.finditer(rb"PK\x01\x02", data):  # the entries of the directory, with the checksum at byte 16
        data[part.start() + 16 : part.start() + 20] = bytes(4)
    path.write_bytes(data)
    weights = assert_loads(path, state)
    assert [note for note in weights.notes if "without checksums" in note] == [check_sums(path)]


def test_an_npz_with_one_damaged_array_is_not_a_file_without_checksums(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.ones(500))
    flip_a_bit(tmp_path / "x.npz", offset_of(tmp_path / "x.npz", "arr_0.npy") + 400)
    refused(tmp_path / "x.npz", r"damaged: arr_0\.npy in it")


def test_other_kinds_have_no_checksums(tmp_path):
    old = save(tmp_path / "old.pth", narrow_state("resnet18"), _use_new_zipfile_serialization=False)
    save_file(narrow_state("resnet18"), tmp_path / "x.safetensors")
    assert check_sums(old) == check_sums(tmp_path / "x.safetensors") == ""


def test_random_bytes_never_cause_a_traceback(tmp_path):
    state, layers = narrow_state("resnet18"), tensorflow_arrays(narrow_state("resnet50"), "resnet50")
    save(tmp_path / "zip.pth", state)
    save(tmp_path / "old.pth", state, _use_new_zipfile_serialization=False)
    (tmp_path / "tar.pth").write_bytes(tar_torch(state))
    save_file(state, tmp_path / "x.safetensors")
    np.save(tmp_path / "x.npy", layers)
    np.savez(tmp_path / "x.npz", arr_0=np.array(layers, dtype=object))
    (tmp_path / "x.caffemodel").write_bytes(caffe_bytes(narrow_state("resnet50"), "resnet50"))
    rng = np.random.default_rng(0)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(12):
            data = bytearray(whole)
            start = int(rng.integers(min(len(data), 20_000)))  # the descriptions come first
            data[start : start + 40] = rng.bytes(40)
            path.write_bytes(bytes(data))
            with contextlib.suppress(WeightsError):
                load_weights(path)
        for length in (len(whole) // 3, len(whole) // 2):
            path.write_bytes(whole[:length])
            refused(path, "it ")


# Nested dictionaries


@pytest.mark.parametrize("keys", [("model_state",), ("net_dict",), ("state", "model"), ("a", "b", "c"), (0, 1)])
def test_a_single_state_dict_is_found_at_any_depth(tmp_path, keys):
    state = narrow_state("resnet18")
    content = state
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "lr": torch.tensor(0.1), "name": "x"}
    slots = {0: {"momentum_buffer": torch.rand(2)}, 1: {"step": torch.tensor(3.0)}}
    content["optimizer"] = {"state": slots, "param_groups": [{"params": [0, 1]}], "by_name": {"conv1.weight": torch.rand(2)}}
    assert_loads(save(tmp_path / "x.pth", content), state)
    assert_loads(save(tmp_path / "x.pth", [content, 3]), state)


def test_several_state_dicts_are_named(tmp_path):
    state, other = narrow_state("resnet18"), {"0.weight": torch.rand(3)}
    for content, names in (
        ({"model": state, "model_ema": state}, r"2 state_dicts \(model, model_ema\).*\['model'\]"),
        ({"G": state, "D": other}, r"2 state_dicts \(G, D\)"),
        ({"nets": {"G": state, "D": other}}, r"2 state_dicts \(nets\.G, nets\.D\).*\['nets'\]\['G'\]"),
        ({**state, "ema": state}, r"2 state_dicts \(the outermost, ema\).*\['ema'\]"),
        ([state, other, 5], r"2 state_dicts \(0, 1\)"),
    ):
        refused(save(tmp_path / "x.pth", content), names)


def test_our_own_checkpoint_is_never_ambiguous(tmp_path):
    state = narrow_state("resnet18")
    content = {"model": state, "meta": {"backbone": "resnet18"}, "optimizer": {"state": {}}, "extra": {"a.b": torch.ones(1)}}
    assert_loads(save(tmp_path / "last.ckpt", content), state)


def test_dictionaries_that_hold_themselves(tmp_path):
    content = {"epoch": 1}
    content["self"] = content
    refused(save(tmp_path / "x.pth", content), "no tensors under the names of parameters")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_net_is_refused_by_name(tmp_path, zipped):
    for content in (torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), {"net": torch.nn.DataParallel(torch.nn.Linear(1, 1))}):
        save(tmp_path / "x.pth", content, _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "x.pth", r"whole net as a Python object \(torch\.nn\..*save the state_dict\(\) of the net")
    save(
        tmp_path / "x.pth", {"conv1.weight": torch.rand(1), "when": collections.deque()}, _use_new_zipfile_serialization=zipped
    )
    refused(tmp_path / "x.pth", r"holds Python objects \(collections\.deque\) besides tensors")


# Files that are not weights


def zip_of(*names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return out.getvalue()


def tar_of(*names):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (tar_of("init.caffemodel", "test.prototxt"), r"a tar archive \(init\.caffemodel, test\.prototxt\); unpack it"),
        (tar_of("sys_info", "pickle"), r"before PyTorch 0\.1\.10 that is cut off \(no storages, tensors\)"),
        (gzip.compress(tar_of("a")), "a gzip archive; unpack it"),
        (zip_of("weights/a.pth", "readme.txt"), r"a zip archive \(weights/a\.pth, readme\.txt\); unpack it"),
        (zip_of("net/data.pkl", "net/code/__torch__.py", "net/constants.pkl"), "a TorchScript program"),
        (zip_of("m/archive_format", "m/models/model.json"), r"a program of torch\.export"),
        (zip_of("m/.data/extern_modules", "m/res/model.pkl"), r"a torch\.package archive"),
        (zip_of("metadata.json", "config.json", "model.weights.h5"), "a Keras model"),
        (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file, from Keras"),
        (b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + bytes(90), "a MATLAB file"),
        (b"\x08\x07\x12\x07pytorch\x1a\x032.0" + bytes(90), "an ONNX graph"),
        (pickle.dumps({"blobs": [1, 2]}, protocol=2), "a plain Python pickle"),
        (pickle.dumps({"a": 1}, protocol=4), "a plain Python pickle"),
        (json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors"}}, indent=1).encode(), "index of a safetensors file"),
        (b"404: Not Found\n", "a text file, not weights"),
        (b"\x05" + bytes(7) + b"abc\x01" + bytes(90), "no known kind of weights file"),
        (b"\xff" * 8 + b"{" + bytes(90), "no known kind of weights file"),
        (b"a\x02" + bytes(90), "no known kind of weights file"),
        (b"\x80\x01" + bytes(90), "no known kind of weights file"),
        (b"\x08\x07\x12\x04onnx\x01" + bytes(90), "an ONNX graph"),
        (b"\x08\x07\x12\x04abcd\x01" + bytes(90), "no known kind of weights file"),
        (b"\xff\xd8\xff\xe0JFIF", "a JPEG image"),
        (b"%PDF-1.5", "a PDF document"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_other_files_are_named_in_the_error(tmp_path, content, match):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert "damaged" not in refused(path, match)


def test_lines_describe_the_net_and_the_skipped_keys():
    weights = Weights({}, "a net", {"backbone": "resnet18", "num_classes": 3})
    assert weights.lines() == ["a net: 0 tensors; backbone resnet18, num_classes 3"]
    weights.skipped = {f"k{n}": "why" for n in range(8)}
    assert weights.lines()[1] == "skipped k0, k1, k2, k3, k4, k5 and 2 more: why"


def test_npy_files_of_version_2_and_of_several_objects(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, np.arange(6.0).reshape(2, 3).T, version=(2, 0))
    found, nested = read_numpy(tmp_path / "a.npy", "npy")
    assert not nested
    assert found[""].tolist() == [[0, 3], [1, 4], [2, 5]]
    np.save(tmp_path / "b.npy", np.array([{"a": np.ones(2)}, None], dtype=object))
    assert read_numpy(tmp_path / "b.npy", "npy")[0][""].shape == (2,)  # neither weights nor damage


def test_heads_that_disagree_are_refused(tmp_path):
    state = narrow_state("resnet18")
    state["layer5.conv2d_list.1.weight"] = torch.rand(20, 2, 3, 3)
    refused(save(tmp_path / "x.pth", state), r"disagree on the number of classes \(20, 21\)")


# Tensors that are not plain arrays of numbers

ODD = {
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.bool(),
    "whole": lambda t: t.long(),
    "whole without a sign": lambda t: t.to(torch.uint16),
    "one number": lambda t: torch.tensor(1.0),
    "one whole number": lambda t: torch.tensor(1),
    "no numbers": lambda t: t[:0],
    "one axis more": lambda t: torch.stack([t, t], -1),
    "more numbers than memory": lambda t: torch.zeros((), dtype=torch.half).expand(1 << 21, 1 << 21),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_refused_in_one_sentence(tmp_path, kind):
    """Each at a place where the loader computes with it; one of another shape is refused when it is loaded into a net."""
    small = narrow_state("resnet18")
    backbone = {key: value for key, value in small.items() if not key.startswith("layer5.")} | {"fc.weight": torch.rand(5, 2)}
    scales = {f"Scale{n}.{key}": value for key, value in small.items() for n in (1, 2, 3)}
    huge = kind == "more numbers than memory"
    shapes = kind in ("one number", "one axis more", "no numbers")
    for state, keys in (
        (small, ["conv1.weight", "bn1.running_var", "layer5.conv2d_list.0.bias"]),
        (backbone, ["bn1.running_mean", "fc.weight"]),
        (scales, ["Scale2.layer1.0.conv1.weight"]),
        ({"model": small, "meta": {"backbone": "resnet18"}}, ["bn1.bias"]),
    ):
        for key in keys:
            inner = state.get("model", state)
            old = inner[key]
            inner[key] = ODD[kind](old)
            path = save(tmp_path / "x.pth", state)
            inner[key] = old
            if shapes or (huge and key == "fc.weight"):  # fc.weight has no place in the net
                with contextlib.suppress(WeightsError):
                    load_weights(path)
            else:
                refused(path, "its |differ" if huge else re.escape(f"its {key} is "))


def test_odd_keys_and_counters_are_not_parameters(tmp_path):
    state = narrow_state("resnet18")
    odd = {5: torch.rand(2), b"a.b": torch.rand(2), "n_averaged": torch.tensor(3), ("a", "b"): torch.rand(1)}
    weights = load_weights(save(tmp_path / "x.pth", state | odd))
    assert weights.state.keys() == state.keys()
    assert weights.skipped.keys() == {"5", "b'a.b'", "n_averaged", "('a', 'b')"}
    refused(save(tmp_path / "x.pth", state | {"bn1.num_batches_tracked": torch.tensor(3.0).to("meta")}), "is a meta tensor")
    refused(save(tmp_path / "x.pth", state | {"bn1.num_batches_tracked": torch.ones(3)}), r"is \(3,\); expected at most 1 num")
    refused(save(tmp_path / "x.pth", {b"conv1.weight": torch.rand(2)}), "holds no tensors under the names of parameters")


def test_control_characters_in_names_are_not_shown(tmp_path):
    weights = load_weights(save(tmp_path / "x.pth", narrow_state("resnet18") | {"a.\x1b[2Jb": torch.rand(2)}))
    assert "a.?[2Jb" in "".join(weights.lines())
    assert "\x1b" not in "".join(weights.lines())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone", 50),
        ("atrous_rates", 6),
        ("atrous_rates", [6, 12, 18, "24"]),
        ("atrous_rates", [6, 12, 18, 0]),
        ("stride_in_3x3", "yes"),
        ("batch_norm_eps", "1e-5"),
        ("batch_norm_eps", 0.0),
        ("batch_norm_eps", float("nan")),
        ("num_classes", [21]),
        ("net", {}),
        ("negative_slope", 1.0),
        ("auxiliary_channels", 0),
    ],
)
def test_a_meta_that_no_net_has_is_refused(tmp_path, name, value):
    meta = {"backbone": "resnet18"} | {name: value}
    refused(save(tmp_path / "x.pth", {"model": narrow_state("resnet18"), "meta": meta}), f"its meta says {name} ")


@pytest.mark.parametrize("classes", [0, 256])
def test_heads_with_more_classes_than_label_values_are_refused(tmp_path, classes):
    state = narrow_state("resnet18", head=0)
    for k in range(4):
        state |= {
            f"layer5.conv2d_list.{k}.weight": torch.rand(classes, 2, 3, 3),
            f"layer5.conv2d_list.{k}.bias": torch.rand(classes),
        }
    refused(save(tmp_path / "x.pth", state), f"its head has {classes} classes; expected 1..255")
