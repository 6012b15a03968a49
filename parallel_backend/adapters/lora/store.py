"""Which changes a request asks for: those in LoRA files, and those that clients have sent to be kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ...errors import UserError
from ...files.checkpoint import open_checkpoint
from ...files.states import FileStates
from ...protocol.messages import Adapters, LoraRef, WeightChange
from .change import Change, changes_of
from .delta import ROLES
from .file import LoraFile, read_lora
from .module_names import Names

if TYPE_CHECKING:
    from ...engine.model import Transformer
    from ...run_context import Run

MAX_BYTES = 2 << 30
"""How much of what was sent is kept in host memory; what was used longest ago goes first."""
NAMED = 3
"""How many of the keys that do not fit are named."""


class AdapterStore:
    """What was sent, by its digest. The same on every rank."""

    def __init__(self, states: FileStates) -> None:
        self._states = states
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def keep(self, digests: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """Raises `UserError` for tensors that are no change's."""
        sent: dict[str, dict[str, Tensor]] = {digest: {} for digest in digests}
        for name, tensor in tensors.items():
            index, _, role = name.partition(".")
            if role not in ROLES or not index.isdigit() or int(index) >= len(digests):
                raise UserError(f"{name!r} is no tensor of a change.")
            sent[digests[int(index)]][role] = tensor.clone()
        self._kept |= sent
        while len(self._kept) > len(sent) and self._bytes > MAX_BYTES:
            self._kept.popitem(last=False)

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Those that are not here; the others count as used now."""
        for digest in digests:
            if digest in self._kept:
                self._kept.move_to_end(digest)
        return [digest for digest in dict.fromkeys(digests) if digest not in self._kept]

    def forget(self) -> None:
        self._kept.clear()

    def adapt(self, transformer: Transformer, wanted: Adapters, run: Run) -> None:
        """Have the changes of `wanted` on the transformer, and no others. It costs nothing where they are there.

        Raises `UserError`, and the transformer is then without any, for what does not fit the model.
        """
        key = (wanted, tuple(self._states.under(ref.path) for ref in wanted.files))
        if transformer.adapted.key == key:
            return
        transformer.adapted.take_off()
        transformer.family.forget_preludes()
        changes: list[Change] = []
        for ref in wanted.files:
            run.leave_if_cancelled()
            file = read_lora(open_checkpoint(ref.path), transformer.names)
            _tell(ref, file, transformer.names.family, run)
            changes += _at_strength(file.changes, ref, transformer.names.blocks)
        for change in wanted.changes:
            run.leave_if_cancelled()
            changes += self._sent(change, transformer.names)
        transformer.adapted.put(changes, key)

    @property
    def _bytes(self) -> int:
        return sum(tensor.nbytes for parts in self._kept.values() for tensor in parts.values())

    def _sent(self, change: WeightChange, names: Names) -> list[Change]:
        if change.digest not in self._kept:
            raise UserError(f"The change of {change.key} is not in the ranks.", "Queue the prompt again.")
        places = names.original.get(change.key, ())
        if not places:
            raise UserError(
                f"The graph changes {change.key}, which this model does not have.",
                "Remove the node that patches the model, or use a LoRA that was trained for it.",
            )
        if change.rows is not None:
            places = [part for place in places if (part := place.of(*change.rows))]
        if change.swap_halves:
            places = [replace(place, rows=place.rows.roll(len(place.rows) // 2)) for place in places]
        try:
            made = changes_of(places, self._kept[change.digest])
        except UserError as error:
            raise UserError(f"The graph's change of {change.key}: {error.message}", error.hint) from error
        return [each.times(change.strength) for each in made]


def _at_strength(changes: Sequence[Change], ref: LoraRef, blocks: Mapping[str, int]) -> list[Change]:
    """The changes of a file at the strengths that the graph gives it; `blocks`: the number of a parameter's block."""
    count, factors = len(set(blocks.values())), ref.block_strengths
    if factors and len(factors) != count:
        raise UserError(
            f"{Path(ref.path).name} is given {len(factors)} block strengths, but the model has {count} blocks.",
            "Give one for each block, or none.",
        )

    def factor(parameter: str) -> float:
        return factors[blocks[parameter]] if factors and parameter in blocks else 1.0

    return [change.times(ref.strength * factor(change.place.parameter)) for change in changes]


def _tell(ref: LoraRef, file: LoraFile, family: str, run: Run) -> None:
    """Say which keys of a file mean nothing to the model; they are left out, as ComfyUI does."""
    name, total = Path(ref.path).name, len(file.strange)
    if file.strange:
        some = ", ".join(file.strange[:NAMED]) + (" …" if total > NAMED else "")
        run.log("warning", f"{name}: {total} of its {file.total} keys are of nothing in this {family} model: {some}.")
    if file.for_text:
        run.log("info", f"{name}: its {len(file.for_text)} keys of text encoders are left out.")
