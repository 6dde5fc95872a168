"""Sizes on the aligned grid, and the logits of several scales against a naive loop."""

import numpy as np
import torch

from deeplab import fuse_max, multiscale_logits
from deeplab.multiscale import scaled_size
from tests.helpers_nets import EveryEighth, naive_bilinear


def test_published_sizes():
    assert scaled_size((321, 321), 0.75) == (241, 241)
    assert scaled_size((321, 513), 0.5) == (161, 257)
    assert scaled_size((513, 1), 0.75) == (385, 1)


def test_multiscale_logits_and_fusion_against_a_naive_loop():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 33, 49, dtype=torch.float64)
    logits = multiscale_logits(EveryEighth(), images, (1.0, 0.75, 0.5))
    assert [tuple(x.shape[-2:]) for x in logits] == [(5, 7), (4, 5), (3, 4)]
    fused = fuse_max(logits)
    for n in range(2):
        for c in range(3):
            planes = []
            for scale in (1.0, 0.75, 0.5):
                small = naive_bilinear(images[n, c].numpy(), scaled_size((33, 49), scale))[::8, ::8]
                planes.append(small if scale == 1.0 else naive_bilinear(small, (5, 7)))
            np.testing.assert_allclose(fused[n, c].numpy(), np.maximum.reduce(planes), atol=1e-12)
