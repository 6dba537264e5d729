"""Losses and gradients taken a few positions at a time are those of torch's own functions on all of them."""

import pytest
import torch
from torch import Tensor, nn

from vllm_requant.offline import losses
from vllm_requant.offline.losses import cross_entropy, divergence


def _logits(tokens: int, seed: int) -> Tensor:
    return 3.0 * torch.randn(tokens, 97, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 97, 300, 1 << 19])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_VALUES_AT_ONCE", request.param)


@pytest.mark.usefixtures("_chunks")
def test_cross_entropy_is_that_of_torch() -> None:
    targets = torch.randint(97, (41,), generator=torch.Generator().manual_seed(2))
    ours, theirs = (_logits(41, 0).requires_grad_() for _ in range(2))
    loss, want = cross_entropy(ours, targets), nn.functional.cross_entropy(theirs, targets)
    torch.testing.assert_close(loss, want)
    (2 * loss).backward()
    (2 * want).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.usefixtures("_chunks")
def test_divergence_is_that_of_torch() -> None:
    ours, theirs = (_logits(41, 0).requires_grad_() for _ in range(2))
    reference = _logits(41, 1)
    kept = reference.clone()
    loss = divergence(ours, reference)
    student, teacher = torch.log_softmax(theirs, -1), torch.log_softmax(reference, -1)
    want = nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, want)
    (2 * loss).backward()
    (2 * want).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(reference, kept)


def test_gradients_have_the_type_of_the_logits() -> None:
    logits = _logits(5, 0).bfloat16().requires_grad_()
    loss = divergence(logits, _logits(5, 1).bfloat16())
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_without_a_gradient_none_is_made() -> None:
    with torch.no_grad():
        assert not divergence(_logits(5, 0).requires_grad_(), _logits(5, 1)).requires_grad
    assert float(divergence(_logits(5, 0), _logits(5, 0))) == 0.0
