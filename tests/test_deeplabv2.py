"""The head of DeepLab-v2 as one product, used for training in half precision, against its convolutions."""

import pytest
import torch
import torch.nn.functional as F

from deeplab.deeplabv2 import ASPP


def with_gradients(head, x, forward):
    """The logits in float64, and the gradients of their weighted sum for the input and the parameters."""
    x = x.detach().requires_grad_()
    logits = forward(x).double()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((logits * weights).sum(), [x, *head.parameters()])
    return [logits.detach(), *(gradient.double() for gradient in gradients)]


@pytest.mark.parametrize(
    ("classes", "rates", "size"), [(5, (6, 12, 18, 24), (17, 30)), (1, (1, 2), (3, 1)), (21, (6, 12), (5, 9))]
)
def test_product_equals_the_sum_of_the_convolutions(classes, rates, size):
    torch.manual_seed(0)
    head = ASPP(7, classes, rates).double()
    for conv in head.conv2d_list:
        torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 7, *size, dtype=torch.float64)
    for found, expected in zip(with_gradients(head, x, head._as_one_product), with_gradients(head, x, head), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_that_of_the_convolutions(dtype):
    """Logits and gradients in half precision, against the same half-precision inputs and weights in float64."""
    torch.manual_seed(2)
    head = ASPP(96, 21).eval()
    for parameter in head.parameters():
        parameter.data = parameter.to(dtype).float()  # so that all three use the same numbers
    x = torch.randn(2, 96, 19, 23).relu().to(dtype).float()
    exact = with_gradients(head.double(), x.double(), head)
    head.float()
    errors = []
    for training in (False, True):  # convolutions, product
        with torch.autocast("cpu", dtype):
            results = with_gradients(head.train(training), x.to(dtype), head)
        errors.append([float((found - true).square().mean().sqrt()) for found, true in zip(results, exact, strict=True)])
    convolutions, product = errors
    assert product[0] < 0.8 * convolutions[0]  # logits
    assert product[1] < 1.02 * convolutions[1]  # gradient of the input
    assert sum(product[2:]) < 1.02 * sum(convolutions[2:])  # gradients of the parameters


@pytest.mark.parametrize(
    ("training", "amp", "classes", "expected"),
    [
        (True, True, 21, True),
        (True, True, 32, True),
        (True, True, 33, False),
        (True, False, 21, False),
        (False, True, 21, False),
    ],
)
def test_product_is_for_training_in_half_precision_with_few_classes(training, amp, classes, expected, monkeypatch):
    folds, fold = [], F.fold
    monkeypatch.setattr(F, "fold", lambda *args, **kwargs: folds.append(1) or fold(*args, **kwargs))
    head, x = ASPP(3, classes).train(training), torch.randn(1, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        x = torch.clone(x) if not amp else F.conv2d(x, torch.eye(3)[:, :, None, None])
        logits = head(x)
    assert len(folds) == 4 * expected
    assert logits.shape == (1, classes, 5, 5)
