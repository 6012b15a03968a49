"""Every message that crosses the socket, as a strict schema: unknown fields, wrong types and wrong values are refused.

A message is the JSON header of a frame. Tensors travel in the frame's safetensors body under the names that the
message's docstring gives. Model state is named by reference (`ModelRef`), so that a restarted sidecar can rebuild
everything from the next request.
"""

from __future__ import annotations

from .base import PROTOCOL_VERSION, Challenge, Hello, Message, Proof, Welcome
from .events import FROM_SIDECAR, Begun, Evaluations, Failure, Heartbeat, Log, Memory, Phase, Progress, Result
from .references import (
    Adapters,
    CacheRule,
    ControlNetRef,
    ControlUse,
    ImagePromptUse,
    IPAdapterRef,
    LoraRef,
    ModelRef,
    StepCache,
    TextRef,
    VaeRef,
    WeightChange,
    WeightDtype,
)
from .requests import (
    FROM_CLIENT,
    MAX_DRAWS,
    MAX_STEPS,
    AnyRequest,
    Cancel,
    Conditioning,
    Decode,
    EncodeImage,
    EncodeText,
    EndRun,
    FindChanges,
    KeepChanges,
    OnOutOfMemory,
    Predict,
    Prompt,
    Request,
    ResidualList,
    RunPrompt,
    Sample,
    Schedule,
    Shutdown,
    Status,
    Unload,
    VaeWork,
    controls_of,
    entries_of,
)
