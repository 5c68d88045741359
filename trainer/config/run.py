"""Every setting of a run: frozen, typed, documented, checked before any model loads.

First stop of the flow recipe -> config -> builders -> loop. Values arrive here from trainer/resolve in three layers:
recipe defaults < --config YAML < section.key=value. A config never changes after it is built and never fills itself in.
Precision, sharding and process count are not here: they belong to the accelerate configuration.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from trainer.config.data import TASK_OF_OBJECTIVE, ClassificationData, InstructData, LiveData, StreamData, Target
from trainer.config.method import FullConfig, MethodConfig
from trainer.config.pairs import PairData
from trainer.config.questions import QuestionData
from trainer.config.section import Fraction, MayChange, Probability, Section
from trainer.config.tags import TagData

MetricName = Literal[
    "loss", "accuracy", "precision", "recall", "f1", "micro_f1", "exact_match", "mae", "pearson", "spearman"
]
TaskName = Literal[
    "classification", "token_classification", "question_answering", "clm", "mlm", "mlm_pairs", "plm", "seq2seq"
]

PRECISIONS = ("no", "bf16", "fp16")
"""What a run may be started in, no being fp32: a choice of the launcher's, not a setting."""


class ModelConfig(Section):
    """Which model, and how its weights start."""

    source: str = "asset:minilm"
    """`asset:NAME`, a local folder of a Hugging Face model, or a hub id."""
    task: TaskName = "classification"
    """What the model's head predicts: a class; a class of each word; where an answer starts and ends; the next token (clm); masked tokens
    (mlm), and whether two texts belong together (mlm_pairs); tokens in a permuted order (plm); a text from a text (seq2seq)."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the architecture from `source` and trains from scratch."""
    added_tokens: Path | None = None
    """File with one word a line that the tokenizer gets as tokens of their own (`samestep data vocabulary` proposes
    some); for method full."""
    dropout: Probability | None = None
    """Dropout of hidden states, for models that have one. None keeps the model's own rate."""
    attention_dropout: Probability | None = None
    """Dropout of attention probabilities. None keeps the model's own rate."""
    head_dropout: Probability | None = None
    """Dropout before the classifier. None keeps the model's own rate."""
    pooling: Literal["model", "first", "mean"] = "model"
    """What the classification head reads. `model`: the head that transformers gives the architecture, such as BERT's pooler. `first`: the
    last layer's first token; `mean`: the mean of its tokens. These two have a head of samestep's (trainer/model/pooled_head.py), which
    samestep reopens and plain transformers does not."""
    head_layers: Literal[1, 2] | None = None
    """With pooling=first or mean. 1: dropout and a linear layer; 2: a linear layer and tanh before these. None: 1, and the architecture's
    own with pooling=model."""
    attention: Annotated[Literal["auto", "eager", "sdpa", "flash_attention_2"], MayChange] = "auto"
    """Attention kernel. `auto` is transformers' own choice for the model and device."""
    gradient_checkpointing: Annotated[bool, MayChange] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: Annotated[bool, MayChange] = False
    """Run Python code shipped inside a model repository. Off: such a model is refused."""

    @model_validator(mode="after")
    def _head_fits(self) -> Self:
        if self.pooling != "model" and self.task != "classification":
            raise ValueError(
                f"pooling ({self.pooling}) is of the head of model.task=classification, not of {self.task}; set model.pooling=model"
            )
        if self.pooling == "model" and self.head_layers is not None:
            fix = "set model.pooling=first or mean, or model.head_layers=none"
            if self.task != "classification":
                fix = "set model.head_layers=none"
            raise ValueError(f"head_layers ({self.head_layers}) has no effect on the architecture's own head; {fix}")
        return self


DataConfig = Annotated[
    ClassificationData | StreamData | LiveData | InstructData | PairData | QuestionData | TagData,
    Field(discriminator="kind"),
]

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("loss", "accuracy", "precision", "recall", "f1"),
    "token_classification": ("loss", "precision", "recall", "f1"),
    "question_answering": ("loss", "exact_match", "f1"),
    **dict.fromkeys(("clm", "mlm", "mlm_pairs", "plm", "seq2seq"), ("loss",)),
}
"""What train.metric may watch, by model.task."""
TARGET_METRICS: dict[str, tuple[str, ...]] = {
    "single": METRICS["classification"],
    "multi": ("loss", "f1", "micro_f1", "accuracy"),
    "regression": ("loss", "mae", "pearson", "spearman"),
}
"""The same for classification, by data.target."""
KINDS: dict[str, tuple[str, ...]] = {
    "classification": ("classification",),
    "token_classification": ("tags",),
    "question_answering": ("questions",),
    "clm": ("stream", "live", "instruct"),
    **dict.fromkeys(("mlm", "mlm_pairs", "plm"), ("stream",)),
    "seq2seq": ("stream", "pairs"),
}
"""The kinds of data that a task learns from."""


class OptimConfig(Section):
    """AdamW and its learning rate."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """`adamw` is torch's. The others are bitsandbytes': moments in 8 bits, in memory that may leave the GPU, or both. They keep whole
    parameters' moments, so they run on one process or with copies of the model, not where it is sharded."""
    peak_lr: PositiveFloat | None = None
    """Highest learning rate. None: the usual one of the method, such as 2e-5 for full and 3e-4 for lora (trainer/model/methods.py)."""
    head_lr: PositiveFloat | None = None
    """Highest learning rate of the classification head. None: the same as the rest."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Each layer's rate is this times the one above it (ULMFiT, arXiv 1801.06146). 1: the same for all."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warmup; linear and cosine end at `min_lr_fraction` of the peak."""
    warmup_fraction: Fraction = 0.1
    """Share of all steps over which the rate rises linearly from 0."""
    min_lr_fraction: Fraction = 0.0
    """Rate at the last step as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled decay of weight matrices; biases, norms and embeddings never decay."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the global gradient norm to this. None: no clipping."""


class TrainConfig(Section):
    """How long, in which batches, and what is watched."""

    num_epochs: PositiveFloat | None = None
    """Passes over the training split. Exactly one of `num_epochs` and `max_steps` is set."""
    max_steps: PositiveInt | None = None
    """Optimizer steps."""
    global_batch_size: PositiveInt = 32
    """Samples per optimizer step over all ranks; the same whatever the number of processes."""
    micro_batch_size: Annotated[PositiveInt | None, MayChange] = None
    """Most samples in one forward pass of one rank. None: the rank's whole share. Accumulation follows from it."""
    eval_batch_size: Annotated[PositiveInt, MayChange] = 64
    """Most samples in one forward pass of one rank during evaluation."""
    eval_every: Annotated[PositiveInt | None, MayChange] = None
    """Steps between evaluations. None: once per epoch. The last step is always evaluated."""
    save_every: Annotated[PositiveInt | None, MayChange] = None
    """Steps between checkpoints. None: with every evaluation. The last step is always saved."""
    keep_last: Annotated[int, Field(ge=2), MayChange] = 2
    """Newest checkpoints to keep. That of the best step, where it was saved, and any with a file NAME.keep beside it are kept too."""
    resume: Annotated[str, MayChange] = "auto"
    """`auto`: continue where the run directory's newest good checkpoint ends; `never`: start anew, the earlier run is moved aside (a
    Slurm job does so once, and continues when it is restarted); or the path of a checkpoint or run directory to start from."""
    extend: Annotated[bool, MayChange] = False
    """Let a continued run be longer than it was (`num_epochs` or `max_steps`); the schedule follows the new length."""
    log_every: Annotated[PositiveInt, MayChange] = 10
    """Steps between log lines."""
    metric: MetricName | None = None
    """The validation metric that chooses the best step, whose weights are exported, and that early stopping watches. None: accuracy for
    one label, f1 (the mean over labels) for several and for tags and answers, the loss for anything else."""
    patience: Annotated[PositiveInt | None, MayChange] = None
    """Stop after this many evaluations without a better `metric`. None: never."""
    on_nonfinite: Annotated[Literal["stop", "skip", "rollback"], MayChange] = "stop"
    """What all ranks do when the loss or the gradient norm is not finite: stop with an error, skip the step, or go back to the newest
    checkpoint and leave the step out from there."""
    on_spike: Annotated[Literal["ignore", "stop", "skip", "rollback"], MayChange] = "ignore"
    """The same for a gradient norm of more than `spike_factor` times its moving average."""
    spike_factor: Annotated[PositiveFloat, MayChange] = 10.0
    """What counts as a spike."""
    max_skipped_steps: Annotated[PositiveInt, MayChange] = 10
    """One more skipped step than this stops the run."""
    max_rollbacks: Annotated[PositiveInt, MayChange] = 3
    """One more rollback than this stops the run."""
    time_limit_minutes: Annotated[PositiveFloat | None, MayChange] = None
    """Stop, with a checkpoint, this long after training began; the same command goes on. None: no limit."""
    hang_timeout_s: Annotated[PositiveFloat | None, MayChange] = 300.0
    """End the job, with a report of which rank hangs in what, when a rank makes no progress for so many seconds. None: never."""
    ddp_find_unused_parameters: Annotated[bool, MayChange] = False
    """Under ddp, look in every step for trained weights that the loss does not reach, such as those of experts that no token was sent to.
    The other backends refuse passes that reach different weights."""
    seed: int = 0
    """Seed of data order, new weights and dropout."""
    deterministic: Annotated[bool, MayChange] = False
    """Ask torch for deterministic algorithms (slower on a GPU)."""

    @model_validator(mode="after")
    def _length_is_set_once(self) -> Self:
        if (self.num_epochs is None) == (self.max_steps is None):
            raise ValueError(
                f"num_epochs ({self.num_epochs}) and max_steps ({self.max_steps}): exactly one must be set; "
                "set the other to none"
            )
        return self


class ProbeConfig(Section):
    """Set by `samestep parity`: run some steps without dropout and record what they did, instead of training."""

    folder: Path
    """Where rank 0 writes the record."""
    steps: PositiveInt = 5
    """Optimizer steps to run."""


class RunConfig(Section):
    """One run: everything but what the accelerate configuration owns."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"), MayChange]
    """Name of the run; letters, digits, dot, dash and underscore."""
    run_dir: Annotated[Path | None, MayChange] = None
    """Folder for config, logs and the exported model. None: runs/NAME."""
    model: ModelConfig = ModelConfig()
    """Which model."""
    method: MethodConfig = FullConfig()
    """Which weights are trained."""
    data: DataConfig = ClassificationData()
    """What is learned."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    train: TrainConfig = TrainConfig(num_epochs=3)
    """The loop."""
    probe: Annotated[ProbeConfig | None, MayChange] = None
    """Parity's recording instead of training."""

    @model_validator(mode="after")
    def _task_fits(self) -> Self:
        task = self.model.task
        if self.data.kind not in KINDS[task]:
            raise ValueError(
                f"model.task ({task}) learns from data.kind={' or '.join(KINDS[task])}, not from {self.data.kind}"
            )
        if isinstance(self.data, StreamData) and TASK_OF_OBJECTIVE[self.data.objective] != task:
            raise ValueError(
                f"data.objective ({self.data.objective}) needs model.task={TASK_OF_OBJECTIVE[self.data.objective]}, not {task}; set it"
            )
        if self.data.kind == "live" and self.train.max_steps is None:
            raise ValueError("data.kind (live) has no known length; set train.max_steps, and train.num_epochs=none")
        if self.train.metric is not None and self.train.metric not in self.metrics:
            kind = f"model.task={task}" if self.target in (None, "single") else f"data.target={self.target}"
            raise ValueError(f"train.metric ({self.train.metric}) must be one of {', '.join(self.metrics)} for {kind}")
        return self

    @model_validator(mode="after")
    def _method_fits_the_head(self) -> Self:
        name, pooling = self.method.name, self.model.pooling
        if pooling != "model" and name in ("prompt", "p_tuning", "prefix"):
            raise ValueError(
                f"model.pooling ({pooling}) reads the tokens of the text, and method.name={name} puts virtual tokens before them; set "
                "model.pooling=model, or method.name=lora"
            )
        return self

    @property
    def target(self) -> Target | None:
        """`data.target`; None for data without labels."""
        return self.data.target if isinstance(self.data, ClassificationData) else None

    @property
    def metrics(self) -> tuple[str, ...]:
        """What train.metric may watch."""
        return METRICS[self.model.task] if self.target is None else TARGET_METRICS[self.target]

    @property
    def watched_metric(self) -> str:
        """`train.metric`, or the usual one of the task."""
        usual = ("f1", "accuracy") if self.target == "multi" else ("accuracy", "f1")
        return self.train.metric or next((name for name in usual if name in self.metrics), "loss")

    @property
    def isolates_documents(self) -> bool:
        """Whether rows hold documents that do not see each other."""
        data = self.data
        return data.packing == "best_fit" if isinstance(data, InstructData) else getattr(data, "isolate", False)

    @property
    def folder(self) -> Path:
        """The run directory: `run_dir`, or runs/NAME."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name


def check_world(config: RunConfig, world_size: int) -> list[str]:
    """Problems of this config with this number of processes."""
    size = config.train.global_batch_size
    if size >= world_size:
        return []
    return [
        f"train.global_batch_size ({size}) is smaller than the number of processes ({world_size}); every process needs "
        f"a sample: set train.global_batch_size={world_size} or start at most {size}"
    ]
