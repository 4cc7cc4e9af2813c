"""Muon for the matrices of the layers, Adam for the embedding and the norms.

Muon (https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by its
nearest orthogonal matrix, found by a few Newton-Schulz steps. Matrices of one shape are
orthogonalised together, and the processes share the work.
"""

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Push the singular values of [N, rows, columns] matrices, rows <= columns, towards one.

    The steps are so coarse, and correct themselves so well, that bfloat16 is enough.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(NUM_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.to(matrices.dtype)


class MuonAdam(torch.optim.Optimizer):
    """One optimiser for the whole model; `scale` multiplies both learning rates.

    Gradients must already be averaged over the processes, so that every process takes the
    same step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        muon_rate: float = 0.015,
        momentum: float = 0.95,
        weight_decay: float = 0.02,
        embedding_rate: float = 1.5e-2,
        norm_rate: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        matrices, embedding, norms = [], [], []
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                norms.append(parameter)
            else:
                (embedding if "embed" in name else matrices).append(parameter)
        groups = [
            {"params": matrices, "rate": muon_rate, "momentum": momentum, "decay": weight_decay},
            {"params": embedding, "rate": embedding_rate, "betas": betas},
            {"params": norms, "rate": norm_rate, "betas": betas},
        ]
        super().__init__(groups, {})
        self.scale = 1.0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step with the gradients that the parameters hold."""
        muon, *adam = self.param_groups
        self._step_muon(muon)
        for group in adam:
            self._step_adam(group)

    def _step_muon(self, group: dict) -> None:
        rate = group["rate"] * self.scale
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            rows, columns = parameter.shape
            by_shape[min(rows, columns), max(rows, columns)].append(parameter)
        for parameters in by_shape.values():
            directions = self._shared_orthogonal([self._momentum(p, group) for p in parameters])
            for parameter, direction in zip(parameters, directions, strict=True):
                rows, columns = parameter.shape
                upright = direction.mT if rows > columns else direction
                parameter.mul_(1 - rate * group["decay"])
                parameter.add_(upright, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _momentum(self, parameter: nn.Parameter, group: dict) -> Tensor:
        """Return the Nesterov momentum, lying on its longer side."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["momentum"], group["momentum"])
        return ahead.mT if ahead.shape[0] > ahead.shape[1] else ahead

    def _shared_orthogonal(self, matrices: list[Tensor]) -> Tensor:
        """Orthogonalise every `world`-th matrix here and collect the others."""
        stacked = torch.stack(matrices)
        if not dist.is_initialized():
            return orthogonalise(stacked)
        rank, world = dist.get_rank(), dist.get_world_size()
        shared = torch.zeros_like(stacked)
        shared[rank::world] = orthogonalise(stacked[rank::world])
        dist.all_reduce(shared)
        return shared

    def _step_adam(self, group: dict) -> None:
        first_beta, second_beta = group["betas"]
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["mean"] = torch.zeros_like(parameter)
                state["square"] = torch.zeros_like(parameter)
            state["step"] += 1
            state["mean"].lerp_(parameter.grad, 1 - first_beta)
            state["square"].lerp_(parameter.grad.square(), 1 - second_beta)
            mean = state["mean"] / (1 - first_beta ** state["step"])
            square = state["square"] / (1 - second_beta ** state["step"])
            parameter.addcdiv_(mean, square.sqrt().add_(1e-8), value=-group["rate"] * self.scale)
