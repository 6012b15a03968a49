"""A device that is none: its tensors say that they are elsewhere, and keep their numbers in the host's memory.

Where a GPU would make the host wait, it notes the line: a number that is read, a copy from or to ordinary memory,
indices that come from the host. It raises on operations of tensors on two devices, as a GPU does.
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from paralleldit.parallel_backend.distributed import axis
from paralleldit.parallel_backend.sampling import noise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
BACKEND = str(Path(__file__).resolve().parent.parent / "parallel_backend") + "/"
UNFILLED = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
MADE_OF_OTHERS = ("scalar_tensor", "zeros_like", "ones_like", "empty_like", "full_like", "randn_like", "rand_like")


class Far(Tensor):
    """A tensor of the pretended device; `near` has its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near):
        far = Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _device.called(func, args, kwargs or {})

    def tolist(self):
        _device.note("is read")
        return self.near.tolist()


class _Device(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.called(func, args, kwargs or {})

    def note(self, why):
        """Note the innermost function of the backend."""
        frames = [frame for frame in traceback.extract_stack(limit=60) if frame.filename.startswith(BACKEND)]
        where = f"{frames[-1].filename.removeprefix(BACKEND)}, {frames[-1].name}" if frames else "the test"
        self.waits.append(f"{where}: {why}")

    def called(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        is_far = any(isinstance(x, Far) for x in tensors)
        asked = kwargs.get("device")
        goes_far = asked is not None and torch.device(asked) == DEVICE
        if not is_far and not goes_far:
            return func(*args, **kwargs)
        is_result_far = self._noted(name, func, args, kwargs, tensors, goes_far)
        near_args, near_kwargs = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, dict(kwargs)))
        if asked is not None:
            near_kwargs["device"] = torch.device("cpu")
        near_kwargs.pop("non_blocking", None)
        out = func(*near_args, **near_kwargs)
        if name in UNFILLED:
            out.zero_()  # what pretended ranks do not send is finite
        if name.endswith("_") and isinstance(args[0], Tensor):
            return args[0]
        return tree_map(lambda x: Far(x) if isinstance(x, Tensor) and is_result_far else x, out)

    def _noted(self, name, func, args, kwargs, tensors, goes_far):
        """Notes a wait, if it is one; returns whether the result is on the device."""
        waits = not kwargs.get("non_blocking")
        if name == "_local_scalar_dense":
            self.note("is read")
            return False
        if name == "_to_copy" and isinstance(args[0], Far) != goes_far and kwargs.get("device") is not None:
            if waits:
                self.note("is copied")
            return goes_far
        if name == "copy_" and isinstance(args[0], Far) != isinstance(args[1], Far):
            if waits and not (len(args) > 2 and args[2]) and args[1].numel():
                self.note("is copied")
        elif name in ("nonzero", "masked_select", "unique", "_unique2", "equal"):
            self.note("is read")
        elif name.startswith("index") and any(not isinstance(x, Far) for x in tensors[1:] if x.dtype == torch.int64):
            self.note("is copied")
        elif not goes_far and func.namespace == "aten" and name not in MADE_OF_OTHERS:
            near = [tuple(x.shape) for x in tensors if not isinstance(x, Far) and x.ndim]
            if near:
                raise RuntimeError(f"{name}: tensors of two devices, those of the host of the shapes {near}")
        return True


_device = _Device()


def to_device(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the device."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(Far(parameter.data), requires_grad=False)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = Far(buffer)
    return module


SILENT = ("all_to_all_single", "all_reduce", "broadcast", "isend", "irecv")


@contextmanager
def silent_ranks():
    """What ranks would send each other stays away."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    with ExitStack() as stack:
        for name in SILENT:
            stack.enter_context(mock.patch.object(axis.dist, name, nothing))
        stack.enter_context(mock.patch.object(axis, "_all_gather", nothing))
        stack.enter_context(mock.patch.object(axis.dist, "P2POp", nothing))
        stack.enter_context(mock.patch.object(axis.dist, "batch_isend_irecv", return_value=[]))
        yield


@contextmanager
def pretended_device():
    """Yields the list of waits so far, by the function that waits."""
    plain = torch.tensor

    def tensor(data, *, dtype=None, device=None, **kwargs):
        made = plain(data, dtype=dtype)
        return made if device is None or torch.device(device).type == "cpu" else made.to(device)

    def new_tensor(self, data, *, dtype=None, **kwargs):
        made = plain(data, dtype=dtype or self.dtype)
        return made.to(DEVICE) if isinstance(self, Far) else made

    _device.waits.clear()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "tensor", tensor))
        stack.enter_context(mock.patch.object(Tensor, "new_tensor", new_tensor))
        stack.enter_context(mock.patch.object(noise, "_generator", return_value=torch.Generator()))
        stack.enter_context(silent_ranks())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_device)
        yield _device.waits
