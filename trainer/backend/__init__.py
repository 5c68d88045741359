"""The only package that names FSDP, DeepSpeed or gloo: everything else in samestep says "the engine".

Place in the flow: `build_accelerator` first (request.py reads what the launcher asked for, build.py makes it real), then
`build_engine` wraps model and optimizer (wrap.py) and returns an Engine (engine.py) whose methods are the verbs of one step.
Invariant: the backend that was asked for runs, or a BackendError says why not. There is no fallback.
"""

from trainer.backend.build import agree_on_start, build_accelerator, build_engine
from trainer.backend.engine import Engine, NoRoomError
from trainer.backend.heartbeat import Heartbeat
from trainer.backend.pieces import WEIGHT, Piece
from trainer.backend.side import SideGroup

__all__ = [
    "WEIGHT",
    "Engine",
    "Heartbeat",
    "NoRoomError",
    "Piece",
    "SideGroup",
    "agree_on_start",
    "build_accelerator",
    "build_engine",
]
