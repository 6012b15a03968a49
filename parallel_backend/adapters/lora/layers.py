"""Layers that add changes to a model's outputs: its weights stay, so that removing changes restores every bit.

A merged LoRA would cost a copy of what it changes (of nearly all of a Flux), has no place in weights that are put
together block by block, and cannot be taken out of bf16 or fp8 exactly. Beside a layer, plain LoRAs are two thin
matrices. Other changes give the layer a matrix for the time of one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...layout.stages import block_of
from ...strategies.tensor import TensorParallel
from ...weights.load import LoadedTransformer
from ...weights.stored_linear import StoredLinear
from .change import Change
from .delta import EVERY, Delta, LowRank, Magnitude


class OwnChange:
    """This rank's part of a change: `delta`, cut as its parameter is, and its `magnitude` if it is a DoRA.

    `add_up`: the sum over the ranks, if the lengths of the magnitude are divided among them.
    """

    def __init__(
        self,
        delta: Delta,
        magnitude: Magnitude | None,
        strength: float,
        add_up: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.delta = delta
        self.magnitude = magnitude
        self.strength = strength
        self._add_up = add_up
        self._scale: Tensor | None = None

    def added_to(self, weight: Tensor) -> Tensor:
        """`weight` `[rows, columns]`, fp32, changed. It is the same one at every call."""
        if self.magnitude is None:
            return weight + self.strength * self.delta.dense()
        changed = weight + self.delta.dense()
        if self._scale is None:
            self._scale = self._lengthening(self.magnitude, weight if self.magnitude.of_base else changed)
        return torch.lerp(weight, changed * self._scale, self.strength)

    def _lengthening(self, magnitude: Magnitude, measured: Tensor) -> Tensor:
        squares = measured.square().sum(1 if magnitude.of_rows else 0)
        if self._add_up:
            squares = self._add_up(squares)
        scale = magnitude.lengths / (squares.sqrt() + torch.finfo(torch.float32).eps)
        return scale.unsqueeze(1 if magnitude.of_rows else 0)


@dataclass(frozen=True)
class SidePath:
    """Plain LoRAs of a layer: their outputs are added to its own. `down` `[r, in]`, `up` `[out, r]`, `bias` `[out]`.

    `torch.compile` takes their tensors as inputs, as it does the weight: one graph is for all layers alike, and for all
    LoRAs of the same ranks.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, changes: Sequence[OwnChange], bias: Tensor | None, dtype: torch.dtype) -> SidePath:
        lows = [(change.delta, change.strength) for change in changes if isinstance(change.delta, LowRank)]
        down = torch.cat([low.down.to(dtype) for low, _ in lows])
        up = torch.cat([(strength * low.scale * low.up.float()).to(dtype) for low, strength in lows], dim=1)
        return cls(down, up, bias)

    def __call__(self, layer: StoredLinear, x: Tensor) -> Tensor:
        output, narrow = layer.product(x), F.linear(x, self.down)
        output.flatten(0, -2).addmm_(narrow.flatten(0, -2), self.up.t())
        return output if self.bias is None else output.add_(self.bias)


@dataclass(frozen=True)
class ChangedMatrix:
    """Any changes of a layer: it has another matrix for the time of a call, and another bias. `bias` is added."""

    changes: tuple[OwnChange, ...]
    bias: Tensor | None

    def __call__(self, layer: StoredLinear, x: Tensor) -> Tensor:
        matrix = layer.matrix(x.dtype).float()
        for change in self.changes:
            matrix = change.added_to(matrix)
        return F.linear(x, matrix.to(x.dtype), layer.bias if self.bias is None else layer.bias + self.bias)


class AdaptedLayers:
    """The changes that are on a transformer now. `tensor` knows the tensor-parallel ranks of the run under way."""

    def __init__(self, loaded: LoadedTransformer, tensor: TensorParallel) -> None:
        self._loaded = loaded
        self._tensor = tensor
        self.key: object = None
        """Identifies the changes that are on."""
        self._layers: list[StoredLinear] = []
        self._replaced: list[tuple[nn.Module, str, nn.Parameter]] = []

    def put(self, changes: Sequence[Change], key: object) -> None:
        """These changes, in their order, and no others. Raises `UserError`, with no changes put, if one cannot be."""
        self.take_off()
        by_parameter: dict[str, list[OwnChange]] = {}
        for change in changes:
            parameter = self._own(change.place.parameter)
            if change.strength and parameter is not None:
                by_parameter.setdefault(change.place.parameter, []).append(self._part(change))
        linear: dict[str, dict[str, list[OwnChange]]] = {}
        others = {}
        for name, own in by_parameter.items():
            path, _, leaf = name.rpartition(".")
            is_called = not name.startswith(self._loaded.spec.never_fp8)
            if is_called and isinstance(self._loaded.module.get_submodule(path), StoredLinear):
                linear.setdefault(path, {})[leaf] = own
            else:
                others[name] = self._changed(name, own)
        for path, leaves in linear.items():
            self._put_beside(path, leaves.get("weight", []), leaves.get("bias", []))
        for name, parameter in others.items():
            self._replace(name, parameter)
        self.key = key

    @property
    def change_weights(self) -> bool:
        """Whether some change gives a layer another matrix at each call; plain LoRAs do not."""
        return any(isinstance(layer.adapter, ChangedMatrix) for layer in self._layers)

    def take_off(self) -> None:
        """Removes all changes: the model is what it was, bit for bit."""
        for layer in self._layers:
            layer.adapter = None
        for owner, leaf, parameter in self._replaced:
            setattr(owner, leaf, parameter)
        self._layers, self._replaced = [], []
        self.key = None

    def _own(self, name: str) -> Tensor | None:
        """The parameter, where this rank holds something of it."""
        path, _, leaf = name.rpartition(".")
        parameter = getattr(self._loaded.module.get_submodule(path), leaf)
        return None if parameter is None or parameter.is_meta else parameter

    def _part(self, change: Change) -> OwnChange:
        name, loaded, device = change.place.parameter, self._loaded, self._device(change.place.parameter)
        shape = loaded.shapes[name]
        width = math.prod(shape[1:])
        if change.delta.shape[1] != width:
            raise UserError(
                f"A LoRA changes {change.delta.shape[1]} columns of {name}, which has {width} in this model.",
                "Choose a LoRA that was trained for this model.",
            )
        rows, columns, magnitude, add_up = change.place.rows, EVERY, change.magnitude, None
        if slices := loaded.cuts.slices(name, shape):
            kept = torch.cat([torch.arange(part.start, part.stop) for part in slices.ranges])
            rows, columns = (rows[kept], columns) if slices.dim == 0 else (rows, kept)
            if magnitude and magnitude.of_rows == (slices.dim == 1):
                add_up = self._tensor.add_up
        own_magnitude = magnitude.part(rows, columns, device) if magnitude else None
        return OwnChange(change.delta.part(rows, columns, device), own_magnitude, change.strength, add_up)

    def _device(self, name: str) -> torch.device:
        parameter = self._own(name)
        assert parameter is not None
        return parameter.device

    def _put_beside(self, name: str, weights: list[OwnChange], biases: list[OwnChange]) -> None:
        layer, dtype = self._loaded.module.get_submodule(name), self._loaded.compute_dtype
        assert isinstance(layer, StoredLinear)
        bias = None
        for change in biases:
            added = change.strength * change.delta.dense().squeeze(1)
            bias = added if bias is None else bias + added
        bias = None if bias is None else bias.to(dtype)
        is_plain = weights and all(isinstance(each.delta, LowRank) and each.magnitude is None for each in weights)
        layer.adapter = SidePath.of(weights, bias, dtype) if is_plain else ChangedMatrix(tuple(weights), bias)
        self._layers.append(layer)

    def _changed(self, name: str, changes: Sequence[OwnChange]) -> nn.Parameter:
        """What is no linear layer of its own is small, and is copied: patch embeddings, norms, tables."""
        path, _, leaf = name.rpartition(".")
        owner, parameter = self._loaded.module.get_submodule(path), self._own(name)
        if leaf not in owner._parameters or (self._loaded.shards and block_of(name, self._loaded.spec.blocks)):
            why = "while its block is sharded over the ranks" if leaf in owner._parameters else "as it is no parameter"
            raise UserError(f"A LoRA changes {name}, which it cannot {why}.", "Use weights=whole, or another LoRA.")
        assert parameter is not None
        weight = parameter.reshape(len(parameter), -1).float()
        for change in changes:
            weight = change.added_to(weight)
        return nn.Parameter(weight.view(parameter.shape).to(parameter.dtype), requires_grad=False)

    def _replace(self, name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        owner = self._loaded.module.get_submodule(path)
        self._replaced.append((owner, leaf, owner._parameters[leaf]))  # pyright: ignore[reportArgumentType]
        setattr(owner, leaf, parameter)
