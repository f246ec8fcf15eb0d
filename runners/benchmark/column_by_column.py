"""QuantEase one column at a time, as its authors' release does it: what the benchmark measures our sweeps against."""

from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem


class ColumnByColumn:
    """QuantEase, Algorithm 2 (https://arxiv.org/abs/2309.01885): one matrix-vector product per column, float32, any device.

    Only for timing, and for tests that compare our sweeps with it. Two things that the solvers handle are left out, as
    they do not change the time: inputs that are always zero (their Hessian diagonal is zero, and is divided by), and grids
    with more than one group per row.

    Args:
        problem: weight (out, in) and Hessian (in, in) of a layer.
        grid: the per-channel grid to round to.

    Attributes:
        w_hat: (out, in), the solution so far; it starts as the unquantized weight.
    """

    def __init__(self, problem: LayerProblem, grid: UniformGrid) -> None:
        self.scale, self.zero, self.max_code = grid.scale[:, 0], grid.zero[:, 0], grid.spec.max_code
        self.sigma = problem.hessian / problem.hessian.diagonal()  # column j divided by Sigma_jj
        self.p = problem.weight @ self.sigma  # (out, in): W X X^T, its own column included
        self.sigma.fill_diagonal_(0)  # column j of W_hat does not count in its own update
        self.w_hat = problem.weight.clone()

    def sweep(self, rounds: bool, columns: int | None = None) -> None:
        """Update all columns once, or only the first `columns`; `rounds` says whether to round them to the grid."""
        p_hat = self.w_hat @ self.sigma  # once per sweep; what changes during the sweep is added column by column
        change = self.w_hat.new_zeros(self.w_hat.shape)  # W_hat before the sweep minus W_hat now
        for j in range(columns or self.w_hat.shape[1]):
            beta = self.p[:, j] - p_hat[:, j] + change @ self.sigma[:, j]
            if rounds:
                codes = (beta / self.scale).round().add(self.zero).clamp(0, self.max_code)
                beta = self.scale * (codes - self.zero)
            change[:, j] = self.w_hat[:, j] - beta
            self.w_hat[:, j] = beta
