"""How a matrix of a model is changed: plain LoRA, LoHa, LoKr, a whole difference, each with or without DoRA.

Sources: LoRA (arXiv 2106.09685), LoHa (arXiv 2108.06098), LoKr (LyCORIS, arXiv 2309.14859), DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import UserError

Index = Tensor | slice
EVERY = slice(None)


class Delta(ABC):
    """A change `[rows, columns]` of a matrix, in few numbers. `part` is that of some rows and columns."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @abstractmethod
    def part(self, rows: Index, columns: Index, device: torch.device) -> Delta: ...

    @abstractmethod
    def dense(self) -> Tensor:
        """`[rows, columns]`, fp32."""


@dataclass(frozen=True)
class LowRank(Delta):
    """`scale * up @ down`: `up` `[rows, r]`, `down` `[r, columns]`."""

    up: Tensor
    down: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def part(self, rows: Index, columns: Index, device: torch.device) -> LowRank:
        return LowRank(self.up[rows].to(device), self.down[:, columns].to(device), self.scale)

    def dense(self) -> Tensor:
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class Hadamard(Delta):
    """`scale * (a_up @ a_down) * (b_up @ b_down)`, the product in the middle taken element by element (LoHa)."""

    a: LowRank
    b: LowRank
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape

    def part(self, rows: Index, columns: Index, device: torch.device) -> Hadamard:
        return Hadamard(self.a.part(rows, columns, device), self.b.part(rows, columns, device), self.scale)

    def dense(self) -> Tensor:
        return self.scale * self.a.dense() * self.b.dense()


@dataclass(frozen=True)
class Kronecker(Delta):
    """`scale * kron(a, b)` (LoKr), of it the `rows` and `columns`."""

    a: Tensor
    b: Tensor
    scale: float
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, scale: float) -> Kronecker:
        rows, columns = (torch.arange(a.shape[dim] * b.shape[dim]) for dim in (0, 1))
        return cls(a, b, scale, rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    def part(self, rows: Index, columns: Index, device: torch.device) -> Kronecker:
        return replace(
            self,
            a=self.a.to(device),
            b=self.b.to(device),
            rows=self.rows[rows].to(device),
            columns=self.columns[columns].to(device),
        )

    def dense(self) -> Tensor:
        height, width = self.b.shape
        of_a = self.a[self.rows // height][:, self.columns // width]
        return self.scale * of_a * self.b[self.rows % height][:, self.columns % width]


@dataclass(frozen=True)
class Difference(Delta):
    """The change itself."""

    diff: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.diff.shape[0], self.diff.shape[1]

    def part(self, rows: Index, columns: Index, device: torch.device) -> Difference:
        return Difference(self.diff[rows][:, columns].to(device))

    def dense(self) -> Tensor:
        return self.diff.float()


@dataclass(frozen=True)
class Magnitude:
    """DoRA: the changed matrix's rows (or, not `of_rows`, its columns) are scaled to the lengths `lengths`.

    They are measured on the matrix as it was where `of_base`, as ComfyUI does for rows; else on the changed one.
    """

    lengths: Tensor
    of_rows: bool
    of_base: bool

    def part(self, rows: Index, columns: Index, device: torch.device) -> Magnitude:
        return replace(self, lengths=self.lengths[rows if self.of_rows else columns].to(device))


ROLES = {
    "up": "LoRA",
    "down": "LoRA",
    "mid": "LoRA",
    "w1_a": "LoHa",
    "w1_b": "LoHa",
    "w2_a": "LoHa",
    "w2_b": "LoHa",
    "t1": "LoHa",
    "t2": "LoHa",
    "kron_1": "LoKr",
    "kron_2": "LoKr",
    "kron_1_a": "LoKr",
    "kron_1_b": "LoKr",
    "kron_2_a": "LoKr",
    "kron_2_b": "LoKr",
    "kron_t2": "LoKr",
    "diff": "difference",
    "alpha": "",
    "dora_scale": "",
    "magnitude": "",
}
"""What a tensor of a change may be, and the kind of change that it makes."""

Parts = Mapping[str, Tensor]
"""A change's tensors by role."""


def make_delta(parts: Parts) -> tuple[Delta, Magnitude | None]:
    """The change of a matrix that `parts` describe. Raises `UserError` where they do not fit together."""
    kinds = {ROLES[role] for role in parts} - {""}
    try:
        match kinds.pop() if len(kinds) == 1 else None:
            case "LoRA":
                delta = _low_rank(parts)
            case "LoHa":
                delta = _hadamard(parts)
            case "LoKr":
                delta = _kronecker(parts)
            case "difference":
                delta = Difference(_flat(parts["diff"]))
            case _:
                raise UserError(f"Its tensors make no change that is known: {', '.join(sorted(parts))}.")
        return delta, _magnitude(parts, delta.shape)
    except (KeyError, RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in sorted(parts.items()))
        raise UserError(f"Its tensors do not fit together: {shapes}.") from error


def _low_rank(parts: Parts) -> LowRank:
    up, down = _flat(parts["up"]), _flat(parts["down"])
    rank = down.shape[0]
    if "mid" in parts:
        # A convolution in three: 1x1 to the rank, the kernel `mid`, 1x1 to the outputs.
        mid = parts["mid"].float()
        down = torch.einsum("ij...,jk->ik...", mid, down.float()).flatten(1)
    return _matched(up, down, _scale(parts, rank))


def _matched(up: Tensor, down: Tensor, scale: float) -> LowRank:
    if up.shape[1] != down.shape[0]:
        raise IndexError("The ranks differ.")
    return LowRank(up, down, scale)


def _hadamard(parts: Parts) -> Hadamard:
    if "t1" in parts or "t2" in parts:
        raise UserError("It is a LoHa of a convolution in Tucker form, which this pack does not read.")
    a = _matched(parts["w1_a"], parts["w1_b"], 1.0)
    b = _matched(parts["w2_a"], parts["w2_b"], 1.0)
    if a.shape != b.shape:
        raise IndexError("The factors differ.")
    return Hadamard(a, b, _scale(parts, parts["w1_b"].shape[0]))


def _kronecker(parts: Parts) -> Kronecker:
    if "kron_t2" in parts:
        raise UserError("It is a LoKr of a convolution in Tucker form, which this pack does not read.")
    rank = None
    factors = []
    for name in ("kron_1", "kron_2"):
        if name in parts:
            factors.append(parts[name].float())
        else:
            up, down = parts[f"{name}_a"].float(), parts[f"{name}_b"].float()
            rank = down.shape[0]
            factors.append(up @ down)
    return Kronecker.of(_flat(factors[0]), _flat(factors[1]), 1.0 if rank is None else _scale(parts, rank))


def _scale(parts: Parts, rank: int) -> float:
    """The factor `alpha / rank` of a change; 1 without an alpha."""
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0


def _magnitude(parts: Parts, shape: tuple[int, int]) -> Magnitude | None:
    if "magnitude" in parts:
        lengths, of_rows, of_base = parts["magnitude"].flatten(), True, False
    elif "dora_scale" in parts:
        scale = parts["dora_scale"]
        of_rows = scale.shape[0] == shape[0]
        lengths, of_base = scale.flatten(), of_rows
    else:
        return None
    if len(lengths) != shape[0 if of_rows else 1]:
        raise IndexError("The magnitudes are of another matrix.")
    return Magnitude(lengths.float(), of_rows, of_base)


def _flat(tensor: Tensor) -> Tensor:
    """A convolution's kernel as the matrix that it is; a vector as its only column."""
    return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor.flatten(1)
