import struct

import numpy as np
import pytest
import torch

from deeplab.weights import WeightsError, load_weights
from deeplab.weights.caffemodel import CaffeModel, from_caffe
from deeplab.weights.names import canonical_from_caffe
from tests.helpers_published import batch_norm_layer, blob, caffe_bytes, caffe_layers, layer, message, narrow_state, varint


def read(data):
    model = CaffeModel(data)
    return [model.read(name) for name in model.names]


def test_a_layer_byte_by_byte():
    data = bytes.fromhex(
        "0a 03 6e 65 74"  # name "net"
        "a2 06 22"  # layer, 34 bytes
        "0a 01 63"  # name "c"
        "12 0b 43 6f 6e 76 6f 6c 75 74 69 6f 6e"  # type "Convolution"
        "3a 10"  # blobs, 16 bytes
        "3a 04 0a 02 02 01"  # shape, packed dims 2 1
        "2a 08 00 00 80 3f 00 00 00 c0"  # data, packed 1.0 -2.0
    )
    (found,) = read(data)
    assert (found.name, found.type, found.eps) == ("c", "Convolution", None)
    assert found.blobs[0].dtype == np.float32
    assert found.blobs[0].tolist() == [[1.0], [-2.0]]


def test_blobs_in_all_forms_of_the_format():
    numbers = np.arange(6, dtype=np.float32)
    shape = message(7, message(1, b"\x02\x03"))
    whole = shape + message(5, numbers.tobytes())
    pieces = message(5, numbers[:2].tobytes()) + shape + message(5, numbers[2:].tobytes())
    loose_shape = message(7, b"\x08\x02\x08\x03")
    loose = loose_shape + b"".join(b"\x2d" + struct.pack("<f", value) for value in numbers)
    doubles = shape + message(8, numbers.astype("<f8").tobytes())
    loose_doubles = shape + b"".join(b"\x41" + struct.pack("<d", value) for value in numbers)
    with_diff = whole + message(6, numbers.tobytes())
    for variant in (whole, pieces, loose, doubles, loose_doubles, with_diff):
        (found,) = read(layer("x", "Convolution", variant))
        np.testing.assert_array_equal(found.blobs[0], numbers.reshape(2, 3))
    old = b"\x08\x01\x10\x02\x18\x03\x20\x01" + message(5, numbers.tobytes())  # num, channels, height, width
    assert read(layer("x", "Convolution", old))[0].blobs[0].shape == (1, 2, 3, 1)


def test_fields_without_weights_are_skipped():
    more = message(3, b"bottom") + b"\x2d\0\0\x80\x3f" + message(6, message(1, b"conv1_0")) + b"\x50\x01" + b"\x59" + b"\0" * 8
    data = message(3, b"data") + b"\x20\x0a" + layer("relu", "ReLU") + layer("x", "Convolution", blob(np.ones(3)), more=more)
    model = CaffeModel(data)
    assert model.names == ["x"]
    assert model.read("x").blobs[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("factor", "mean", "var"), [(2.0, [1, 2], [3, 4]), (0.0, [0, 0], [0, 0]), (999.98, [1, 2], [3, 4])])
def test_batch_norm_is_divided_by_its_factor(factor, mean, var):
    data = batch_norm_layer("bn_conv1", np.float32([1, 2]), np.float32([3, 4]), factor)
    data += layer("scale_conv1", "Scale", blob(np.float32([5, 6])), blob(np.float32([7, 8])))
    weights = from_caffe(CaffeModel(data))
    state = weights.state
    torch.testing.assert_close(state["bn1.running_mean"], torch.tensor(mean, dtype=torch.float32))
    torch.testing.assert_close(state["bn1.running_var"], torch.tensor(var, dtype=torch.float32))
    assert state["bn1.weight"].tolist() == [5, 6]
    assert state["bn1.bias"].tolist() == [7, 8]
    assert weights.skipped == {}
    assert weights.config["batch_norm_eps"] == 1e-5


def test_epsilon_is_read():
    one = batch_norm_layer("bn_conv1", np.ones(2), np.ones(2), eps=1e-3)
    assert from_caffe(CaffeModel(one)).config["batch_norm_eps"] == 1e-3
    other = batch_norm_layer("bn2a_branch1", np.ones(2), np.ones(2), eps=1e-5)
    with pytest.raises(WeightsError, match=r"0\.001 in bn_conv1, 1e-05 in bn2a_branch1"):
        from_caffe(CaffeModel(one + other))


def test_names_of_all_layers():
    for backbone, count in (("resnet50", 52), ("resnet101", 103), ("resnet152", 154)):
        pairs = list(caffe_layers(backbone))
        assert len(pairs) == count
        for conv, bn, name in pairs:
            assert canonical_from_caffe(f"res{name}") == conv
            assert canonical_from_caffe(f"bn{name}") == canonical_from_caffe(f"scale{name}") == bn
    assert canonical_from_caffe("fc1_voc12_c3") == canonical_from_caffe("fc1_my_set_c3") == "layer5.conv2d_list.3"
    for other in ("conv1_1", "fc1_voc12", "fc1000", "res2a_branch3", "fc1_voc12_c4", "res6a_branch1", "fc_fusion"):
        assert canonical_from_caffe(other) is None


def test_three_scales_share_their_weights(tmp_path):
    state = narrow_state()
    path = tmp_path / "train_iter_20000.caffemodel"
    path.write_bytes(caffe_bytes(state, "resnet101", suffixes=("_res05", "", "_res075"), factor=2.0))
    weights = load_weights(path)
    assert weights.config["backbone"] == "resnet101"
    assert weights.state.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(weights.state[key], tensor), key
    assert len(weights.skipped) == 2 * 316
    assert set(weights.skipped.values()) == {"equal to the 1x layer"}


@pytest.mark.parametrize("suffix", ["_res05", "_res075"])
def test_unequal_twins_are_refused(tmp_path, suffix):
    state = narrow_state()
    data = caffe_bytes(state, "resnet101")
    state["layer3.21.conv2.weight"][0, 1] += 1e-6
    path = tmp_path / "x.caffemodel"
    path.write_bytes(data + caffe_bytes(state, "resnet101", suffixes=(suffix,)))
    with pytest.raises(WeightsError, match=rf"'res4b21_branch2b' and 'res4b21_branch2b{suffix}' differ"):
        load_weights(path)


def test_the_coco_and_imagenet_heads_are_left_out(tmp_path):
    path = tmp_path / "init.caffemodel"
    body = caffe_bytes(narrow_state(head=0), "resnet101")
    path.write_bytes(body + layer("fc1_coco", "Convolution", blob(np.ones((91, 2, 1, 1))), blob(np.ones(91))))
    weights = load_weights(path)
    assert weights.skipped == {"fc1_coco": "the head of another net"}
    assert "num_classes" not in weights.config
    assert "atrous_rates" not in weights.config
    assert any("COCO" in note and "91" in note for note in weights.notes)
    path.write_bytes(body + layer("fc1000", "InnerProduct", blob(np.ones((1000, 2))), blob(np.ones(1000))))
    weights = load_weights(path)
    assert weights.skipped["fc1000"] == "the image classifier"
    assert any("plain image classifier" in note for note in weights.notes)


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(WeightsError, match="old V1 format"):
        CaffeModel(message(2, message(4, b"conv1") + message(6, blob(np.ones(2)))))
    with pytest.raises(WeightsError, match="without any weights"):
        CaffeModel(layer("relu", "ReLU"))
    with pytest.raises(WeightsError, match="two layers named 'x'"):
        CaffeModel(layer("x", "Scale", blob(np.ones(2))) * 2)
    with pytest.raises(WeightsError, match="'conv1' is a Convolution with 2 blobs; expected a Convolution with 1"):
        from_caffe(CaffeModel(layer("conv1", "Convolution", blob(np.ones((1, 1, 1, 1))), blob(np.ones(1)))))
    with pytest.raises(WeightsError, match=r"'x' is damaged .*4 numbers for a blob of shape \(5,\)"):
        read(layer("x", "Scale", blob(np.ones(4), shape=(5,))))


def test_cut_off_anywhere():
    data = message(1, b"net") + layer("x", "Scale", blob(np.ones(40)), blob(np.ones(40)))
    for length in range(1, len(data)):
        with pytest.raises(WeightsError):
            read(data[:length])
    assert len(read(data)[0].blobs) == 2


def test_varints_without_end_or_past_the_file():
    for junk in (b"\xff" * 20, varint(100 << 3 | 2) + b"\xff" * 9 + b"\x01", b"\x0b\x0c", b"\0\0\0"):
        with pytest.raises(WeightsError):
            CaffeModel(junk)
