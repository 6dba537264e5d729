"""Error feedback is GPTQ's recursion, and degenerate second moments are an expected state."""

import pytest
import torch

from vllm_requant.offline.bases.feedback import compensate, reversed_inverse, upright
from vllm_requant.offline.incidents import collecting


def _problem(columns: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, columns, generator=generator)
    x = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) / 12
    return weight, x.t() @ x / len(x)


def _inverse(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    columns = len(hessian)
    return upright(reversed_inverse(lambda rows: hessian[rows], columns, damping), slice(0, columns))


def _round(column: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.round(values / 0.5)
    return codes, codes * 0.5


def test_factor_inverts() -> None:
    _, hessian = _problem()
    factor = _inverse(hessian, 1e-3)
    assert torch.equal(factor, factor.triu())
    damped = hessian + 1e-3 * hessian.diagonal().mean() * torch.eye(len(hessian))
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(len(hessian)), atol=1e-3, rtol=0)


def test_blocked_loop_is_the_optimal_update_one_column_at_a_time() -> None:
    """After each column all columns left are set to the constrained optimum, found by solving for it."""
    weight, hessian = _problem()
    codes = compensate(weight, hessian, _round, damping=0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    moved = weight.double().clone()
    for step, j in enumerate(order.tolist()):
        target = moved[:, j].clone()
        value = torch.round(target / 0.5) * 0.5
        assert torch.equal(codes[:, j].double() * 0.5, value), step
        left = order[step + 1 :]
        if len(left):
            # argmin over δ of (δ, e) H (δ, e)ᵀ with e fixed: δ = −H_LL⁻¹ H_Lj e
            push = torch.linalg.solve(damped[left][:, left], damped[left, j])
            moved[:, left] -= (value - target)[:, None] * push
        moved[:, j] = value


def test_feedback_beats_rounding() -> None:
    weight, hessian = _problem()
    error = compensate(weight, hessian, _round) * 0.5 - weight
    plain = torch.round(weight / 0.5) * 0.5 - weight
    assert (error @ hessian * error).sum() < 0.5 * (plain @ hessian * plain).sum()


def test_exact_weights_stay_out_of_the_codes_of_others_by_value() -> None:
    weight, hessian = _problem()
    exact = torch.zeros_like(weight, dtype=torch.bool)
    exact[:, 10:20] = True
    changed = weight.clone()
    changed[:, 10:20] += 8.0  # whole steps of the grid
    one, two = (compensate(w, hessian, _round, exact=exact) for w in (weight, changed))
    assert torch.equal(one[:, :10], two[:, :10])
    assert torch.equal(one[:, 20:], two[:, 20:])


def test_singular_second_moments_are_damped() -> None:
    weight, _ = _problem()
    x = torch.randn(3, weight.shape[1])
    x[:, 40] = 0  # an input that never fires
    codes = compensate(weight, x.t() @ x, _round)
    assert torch.isfinite(codes).all()
    # not positive semidefinite at all: damping grows until it is
    broken = x.t() @ x
    broken -= 0.3 * broken.diagonal().mean() * torch.eye(len(broken))
    with collecting() as found:
        assert torch.isfinite(_inverse(broken)).all()
    assert [incident.fallback for incident in found] == ["damping 1 in the place of 0.01"]


def test_hopeless_second_moments_count_as_diagonal() -> None:
    weight, hessian = _problem()
    hopeless = -hessian
    hopeless.diagonal().copy_(hessian.diagonal())
    with collecting() as found:
        codes = compensate(weight, hopeless, _round)
    assert [incident.fallback for incident in found] == ["no error feedback"]
    assert torch.equal(codes, compensate(weight, hopeless.diagonal().diag(), _round))
    with pytest.raises(ValueError, match="not finite"):
        _inverse(torch.full((3, 3), torch.nan))
