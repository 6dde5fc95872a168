"""Helpers for tests of weights files."""

import torch

from deeplab import make_net
from deeplab.weights import apply_weights, load_weights

HEAD = [f"layer5.conv2d_list.{k}.{leaf}" for k in range(4) for leaf in ("weight", "bias")]


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


def load_into_new_net(path, batch_norm="frozen", **changes):
    """Like evaluate.py: build the net that the file describes, and load the file."""
    weights = load_weights(path)
    net = make_net(weights.config | changes, batch_norm)
    return net, weights, apply_weights(net, weights)
