"""Muon for the layers' matrices, AdamW for the rest: half the steps that AdamW alone needs at this size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to a stack (N, rows, columns), by quintic Newton-Schulz iteration."""
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised (Jordan et al. 2024), in float32 and for all layers' matrices at once.

    torch.optim.Muon works matrix by matrix in bfloat16, which is slow on a CPU and for many small matrices.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                # 0.2 * sqrt(larger side) gives the update the size of AdamW's, so both share a learning-rate scale.
                step_size = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-step_size)


def make_optimizers(model: nn.Module, name: str, lr: float) -> list[torch.optim.Optimizer]:
    """One optimizer list for a model: "muon" (matrices by Muon, the rest by AdamW) or "adamw"."""
    layers = {id(p) for p in model.model.layers.parameters() if p.dim() == 2}
    matrices = [p for p in model.parameters() if id(p) in layers]
    rest = [p for p in model.parameters() if id(p) not in layers]
    if name == "adamw":
        return [torch.optim.AdamW([*matrices, *rest], lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]
    if name != "muon":
        raise ValueError(f"optimizer must be 'muon' or 'adamw', not {name!r}")
    return [
        Muon(matrices, lr=lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
