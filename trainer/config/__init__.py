"""Every setting of a run: frozen, typed, documented, checked before any model loads.

First stop of the flow recipe -> config -> builders -> loop. Values arrive here from trainer/resolve in three layers:
recipe defaults < --config YAML < section.key=value. A config never changes after it is built and never fills itself in.
Precision, sharding and process count are not here: they belong to the accelerate configuration.
"""

from trainer.config.augment import Augmentation
from trainer.config.data import ClassificationData, InstructData, LiveData, StreamData, Target, check_weights
from trainer.config.method import (
    AdapterConfig,
    BitfitConfig,
    DoraConfig,
    FullConfig,
    HeadConfig,
    Ia3Config,
    LoraConfig,
    LowRank,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QloraConfig,
    RsloraConfig,
    VeraConfig,
)
from trainer.config.pairs import PairData
from trainer.config.questions import QuestionData
from trainer.config.run import (
    PRECISIONS,
    MetricName,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
    check_world,
)
from trainer.config.section import MayChange, Resume, Section, may_change
from trainer.config.tags import TagData

__all__ = [
    "PRECISIONS",
    "AdapterConfig",
    "Augmentation",
    "BitfitConfig",
    "ClassificationData",
    "DoraConfig",
    "FullConfig",
    "HeadConfig",
    "Ia3Config",
    "InstructData",
    "LiveData",
    "LoraConfig",
    "LowRank",
    "MayChange",
    "MethodConfig",
    "MetricName",
    "ModelConfig",
    "OptimConfig",
    "PTuningConfig",
    "PairData",
    "PrefixConfig",
    "ProbeConfig",
    "PromptConfig",
    "QloraConfig",
    "QuestionData",
    "Resume",
    "RsloraConfig",
    "RunConfig",
    "Section",
    "StreamData",
    "TagData",
    "Target",
    "TrainConfig",
    "VeraConfig",
    "check_weights",
    "check_world",
    "may_change",
]
