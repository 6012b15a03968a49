"""From what the ranks measured in some runs to a schedule, to TeaCache's polynomial, and to a file beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ...parallel_backend.errors import UserError

PARTS = 20
"""Into how many equal parts of the noise levels a schedule divides a run."""
DEGREE = 4
"""Of TeaCache's polynomial."""
INPUT, ALL = 0, 1
"""The rows of `Measured.whole` that are used here: the modulated input, and the residual of all blocks."""
ATTENTION = 2
"""The column of `Measured.changes` of what attention gives."""
SUFFIX = ".redundancy.json"


@dataclass(frozen=True)
class Measured:
    """One run, as a reply to `Sample` tells it: `levels` `[E]`, `changes` `[E - 1, blocks, quantities, 2]`, `whole`
    `[E - 1, 3, 2]`. `name`: of the run, for people."""

    name: str
    levels: Tensor
    changes: Tensor
    whole: Tensor

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Tensor]) -> Measured:
        """Raises `UserError` for a run of so few evaluations that nothing was compared."""
        levels, changes, whole = (tensors[f"study.{part}"] for part in ("levels", "changes", "whole"))
        if len(changes) < 2:
            raise UserError(
                f"The run {name} has {len(levels)} evaluations, and a study compares neighbours of at least 3.",
                "Take more steps; 20 are usual.",
            )
        return cls(name, levels, changes, whole)

    def rates(self) -> Tensor:
        """`[PARTS]`: the relative change of the residual of all blocks for a whole unit of the noise level."""
        return self._rates(self.whole[:, ALL, 0])

    def attention(self) -> Tensor:
        """`[blocks, PARTS]`: as `rates`, of what the attention of each block gives; 0 where there is none."""
        return torch.stack([self._rates(each.nan_to_num(0.0)) for each in self.changes[:, :, ATTENTION, 0].T])

    def _rates(self, changes: Tensor) -> Tensor:
        edges = torch.linspace(0, 1, PARTS + 1)
        high, low = torch.maximum(self.levels[:-1], self.levels[1:]), torch.minimum(self.levels[:-1], self.levels[1:])
        rate = changes / (high - low).clamp_min(1e-6)
        overlap = (torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])).clamp_min(0)
        weights = overlap.sum(0)
        found = (overlap * rate[:, None]).sum(0) / weights
        seen = weights.gt(0).nonzero().flatten()
        nearest = (torch.arange(PARTS)[:, None] - seen).abs().argmin(1)
        return found[seen[nearest]]


@dataclass(frozen=True)
class Findings:
    """What some runs of one model have in common.

    `rates`: as `Measured.rates`, their mean. `coefficients`: of the polynomial from the change of the first block's
    input to that of the residual of all blocks, highest power first; none where the input is not known. `attention`: of
    each block, the rates of what its attention gives. `runs`: their names. `correlation`, `difference`: of the rates of
    each two runs, the worst.
    """

    blocks: int
    rates: tuple[float, ...]
    coefficients: tuple[float, ...]
    attention: tuple[tuple[float, ...], ...]
    runs: tuple[str, ...]
    correlation: float
    difference: float

    @classmethod
    def of(cls, runs: Sequence[Measured]) -> Findings:
        rates = torch.stack([run.rates() for run in runs])
        attention = torch.stack([run.attention() for run in runs]).mean(0)
        pairs = list(combinations(rates, 2))
        return cls(
            blocks=runs[0].changes.shape[1],
            rates=tuple(rates.mean(0).tolist()),
            coefficients=_polynomial(torch.cat([run.whole[:, (INPUT, ALL), 0] for run in runs])),
            attention=tuple(map(tuple, attention.tolist())),
            runs=tuple(run.name for run in runs),
            correlation=min((float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs), default=1.0),
            difference=max((float((a - b).abs().sum() / ((a + b).sum() / 2)) for a, b in pairs), default=0.0),
        )

    def text(self) -> str:
        lines = [
            f"{len(self.runs)} runs of {self.blocks} blocks: {'; '.join(self.runs)}.",
            "Relative change of what all blocks add, for a whole unit of the noise level, from noise to picture: "
            + ", ".join(f"{rate:.2f}" for rate in reversed(self.rates)),
        ]
        if len(self.runs) > 1:
            lines.append(
                f"The two runs that differ most: correlation {self.correlation:.3f}, mean difference "
                f"{100 * self.difference:.0f}%."
            )
        if self.coefficients:
            lines.append("TeaCache's polynomial: " + ", ".join(f"{each:.4g}" for each in self.coefficients))
        return "\n".join(lines)

    def save(self, model: Path) -> Path:
        """Writes the file that `load` reads. Raises `OSError` where the folder cannot be written."""
        path = path_beside(model)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path


def check_blocks(study: Findings, blocks: int) -> None:
    """Raises `UserError` for a study of a model of other than so many `blocks`."""
    if study.blocks != blocks:
        raise UserError(
            f"The study is of a model of {study.blocks} blocks, and this one has {blocks}.",
            "Connect a Parallel Redundancy with this model.",
        )


def path_beside(model: Path) -> Path:
    """The file of the findings about the model in a file or folder."""
    return model.with_name(model.name + SUFFIX)


def load(model: Path) -> Findings:
    """What a study of `model` has saved. Raises `UserError` where there is nothing, or nothing that can be used."""
    path = path_beside(model)
    try:
        data = json.loads(path.read_text())
        return Findings(
            blocks=int(data["blocks"]),
            rates=tuple(map(float, data["rates"])),
            coefficients=tuple(map(float, data["coefficients"])),
            attention=tuple(tuple(map(float, block)) for block in data["attention"]),
            runs=tuple(map(str, data["runs"])),
            correlation=float(data["correlation"]),
            difference=float(data["difference"]),
        )
    except FileNotFoundError as error:
        raise UserError(
            f"There is no {path.name} beside the model, in which a study of it would be.",
            "Queue a Parallel Redundancy with this model, or connect its study.",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path.name} is no study: {error}", "Delete it, and queue Parallel Redundancy again."
        ) from error


def _polynomial(changes: Tensor) -> tuple[float, ...]:
    """The polynomial that fits best from the first column to the second, `[N, 2]`, highest power first."""
    points = changes[changes.isfinite().all(1)].double()
    if len(points) < 2:
        return ()
    degree = min(DEGREE, max(1, len(points) // 5))
    powers = torch.stack([points[:, 0] ** power for power in range(degree, -1, -1)], dim=1)
    return tuple(torch.linalg.lstsq(powers, points[:, 1:], driver="gelsd").solution.flatten().tolist())
