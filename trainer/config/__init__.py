"""Every setting of a run: frozen, typed, documented, checked before any model loads.

First stop of the flow recipe -> config -> builders -> loop. Values arrive here from trainer/resolve in three layers:
recipe defaults < --config YAML < section.key=value. A config never changes after it is built and never fills itself in.
Precision, sharding and process count are not here: they belong to the accelerate configuration.
"""

from trainer.config.data import ClassificationData, LiveData, StreamData
from trainer.config.run import (
    FullConfig,
    HeadConfig,
    LoraConfig,
    MethodConfig,
    MetricName,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
    may_change,
)
from trainer.config.section import MayChange, Resume, Section

__all__ = [
    "ClassificationData",
    "FullConfig",
    "HeadConfig",
    "LiveData",
    "LoraConfig",
    "MayChange",
    "MethodConfig",
    "MetricName",
    "ModelConfig",
    "OptimConfig",
    "ProbeConfig",
    "Resume",
    "RunConfig",
    "Section",
    "StreamData",
    "TrainConfig",
    "may_change",
]
