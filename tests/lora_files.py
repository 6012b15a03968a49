"""Tensors of LoRA files in every format, and what they add to a weight by the formulas of their papers.

Shares no code with the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

RANK = 3

Tensors = dict[str, Tensor]
Make = Callable[[str, Tensor], tuple[Tensors, Tensor]]
"""`make(name, weight)`: a module's tensors in a file, and its weight `[rows, columns]` with them merged into it."""


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


def kohya(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    (rows, columns), alpha = weight.shape, torch.tensor(2.0)
    up, down = draw(rows, RANK), draw(RANK, columns)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}
    return tensors, weight + alpha / RANK * up @ down


def peft(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    rows, columns = weight.shape
    up, down = draw(rows, RANK), draw(RANK, columns)
    return {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}, weight + up @ down


def loha(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    rows, columns = weight.shape
    a, b, c, d = draw(rows, RANK), draw(RANK, columns), draw(rows, RANK), draw(RANK, columns)
    parts = {"w1_a": a, "w1_b": b, "w2_a": c, "w2_b": d}
    tensors = {f"{name}.hada_{part}": tensor for part, tensor in parts.items()}
    return {**tensors, f"{name}.alpha": torch.tensor(1.5)}, weight + 1.5 / RANK * (a @ b) * (c @ d)


def lokr(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """The second factor in two, as for large matrices."""
    rows, columns = weight.shape
    first, up, down = draw(4, 2), draw(rows // 4, RANK), draw(RANK, columns // 2)
    parts = {"w1": first, "w2_a": up, "w2_b": down}
    tensors = {f"{name}.lokr_{part}": tensor for part, tensor in parts.items()}
    return {**tensors, f"{name}.alpha": torch.tensor(1.5)}, weight + 1.5 / RANK * torch.kron(first, up @ down)


def difference(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    diff = draw(*weight.shape) * 0.3
    return {f"{name}.diff": diff}, weight + diff


def peft_dora(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    tensors, changed = peft(name, weight)
    lengths = weight.norm(dim=1) * (1 + draw(len(weight)))
    merged = changed * (lengths / changed.norm(dim=1)).unsqueeze(1)
    return {**tensors, f"{name}.lora_magnitude_vector": lengths}, merged


def dora_of_outputs(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """Lengths are measured on the weight as it was: ComfyUI's reading of `dora_scale`."""
    tensors, changed = kohya(name, weight)
    lengths = weight.norm(dim=1, keepdim=True) * (1 + draw(len(weight), 1))
    return {**tensors, f"{name}.dora_scale": lengths}, changed * lengths / weight.norm(dim=1, keepdim=True)


def dora_of_inputs(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    tensors, changed = kohya(name, weight)
    lengths = weight.norm(dim=0, keepdim=True) * (1 + draw(1, weight.shape[1]))
    return {**tensors, f"{name}.dora_scale": lengths}, changed * lengths / changed.norm(dim=0, keepdim=True)


FORMATS: dict[str, Make] = {
    make.__name__: make for make in (kohya, peft, loha, lokr, difference, peft_dora, dora_of_outputs, dora_of_inputs)
}


def merged(
    weights: Mapping[str, Tensor], names: Mapping[str, str], make: Make, strength: float = 1.0
) -> tuple[Tensors, Tensors]:
    """The tensors of a file, and `weights` with it merged into them at a strength.

    `names`: what the file calls the module, by the name of its weight in `weights`.
    """
    tensors, changed = {}, dict(weights)
    for key, name in names.items():
        weight = weights[key].flatten(1)
        made, result = make(name, weight)
        tensors |= made
        changed[key] = torch.lerp(weight, result, strength).view(weights[key].shape)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, changed
