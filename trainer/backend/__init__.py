"""The only package that names FSDP, DeepSpeed or gloo: everything else in samestep says "the engine".

Place in the flow: `build_accelerator` first (request.py reads what the launcher asked for, build.py makes it real), then
`build_engine` wraps model and optimizer (wrap.py) and returns an Engine (engine.py) whose methods are the verbs of one step.
Invariant: the backend that was asked for runs, or a BackendError says why not. There is no fallback.
"""

from trainer.backend.build import build_accelerator, build_engine
from trainer.backend.engine import Engine

__all__ = ["Engine", "build_accelerator", "build_engine"]
