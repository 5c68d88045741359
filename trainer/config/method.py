"""The methods and their settings: which weights a run trains. What each does to a model stands in trainer/model/methods.py."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from typing_extensions import Self

from trainer.config.section import MayChange, Probability, Section

Targets = tuple[str, ...] | Literal["all-linear"]


def some_target(targets: Targets | None) -> Targets | None:
    """ValueError for no layer at all, which would train the head alone, if anything."""
    if targets == ():
        raise ValueError('needs at least one layer name, such as "query,value" for BERT; or leave it out')
    return targets


class FullConfig(Section):
    """Train every weight."""

    name: Literal["full"] = "full"
    """The method."""


class HeadConfig(Section):
    """Train the classification head only; the encoder stays frozen."""

    name: Literal["head"] = "head"
    """The method."""


class BitfitConfig(Section):
    """Train the biases only (BitFit, arXiv 2106.10199), and the classification head."""

    name: Literal["bitfit"] = "bitfit"
    """The method."""


class LowRank(Section):
    """What LoRA and its relatives share: two factors of low rank beside each linear layer; a classification head is trained too."""

    rank: PositiveInt = 8
    """Rank r of the two factors."""
    alpha: PositiveFloat = 16
    """The adapter's output is scaled by alpha / rank."""
    dropout: Probability = 0.0
    """Dropout on the adapter's input."""
    targets: Targets = "all-linear"
    """Names of the linear layers to adapt (the last parts of their dotted names), or `all-linear`: all but the head."""

    _some_target = field_validator("targets")(some_target)


class LoraConfig(LowRank):
    """Low-rank adapters (Hu et al., arXiv 2106.09685) through PEFT."""

    name: Literal["lora"] = "lora"
    """The method."""


class DoraConfig(LowRank):
    """LoRA that learns each weight's direction and magnitude apart (DoRA, arXiv 2402.09353)."""

    name: Literal["dora"] = "dora"
    """The method."""


class RsloraConfig(LowRank):
    """LoRA scaled by alpha / sqrt(rank), which keeps high ranks learning (rsLoRA, arXiv 2312.03732)."""

    name: Literal["rslora"] = "rslora"
    """The method."""


class QloraConfig(LowRank):
    """LoRA on a base whose linear layers are quantized by bitsandbytes (QLoRA, arXiv 2305.14314)."""

    name: Literal["qlora"] = "qlora"
    """The method."""
    quantize: Literal["nf4", "fp4", "int8"] = "nf4"
    """How the base's linear layers are stored: 4-bit NormalFloat, 4-bit float, or LLM.int8."""
    double_quantization: bool | None = None
    """Quantize the 4-bit blocks' scales too: 0.4 bit less for each weight. None: yes, in 4 bits."""
    compute_dtype: Annotated[Literal["auto", "fp32", "bf16", "fp16"], MayChange] = "auto"
    """What 4-bit weights are expanded to for a product. `auto`: the run's precision. On CPUs without AMX fp32 is the fastest."""

    @model_validator(mode="after")
    def _four_bits(self) -> Self:
        if self.quantize == "int8" and (self.double_quantization is not None or self.compute_dtype != "auto"):
            raise ValueError(
                "double_quantization and compute_dtype have no effect with quantize=int8; leave them out, or use quantize=nf4"
            )
        return self


class VeraConfig(Section):
    """Two random factors shared by all layers, of which each layer learns the scales (VeRA, arXiv 2310.11454)."""

    name: Literal["vera"] = "vera"
    """The method."""
    rank: PositiveInt = 256
    """Rank of the shared factors."""
    dropout: Probability = 0.0
    """Dropout on the adapter's input."""
    targets: Targets = "all-linear"
    """Names of the linear layers to adapt, as for lora."""

    _some_target = field_validator("targets")(some_target)


class Ia3Config(Section):
    """Learned factors on keys, values and feed-forward layers (IA3, arXiv 2205.05638)."""

    name: Literal["ia3"] = "ia3"
    """The method."""
    targets: tuple[str, ...] | None = None
    """Linear layers whose output is scaled. None: PEFT's choice for the architecture."""
    feedforward: tuple[str, ...] | None = None
    """Those of `targets` whose input is scaled instead. None: PEFT's choice for the architecture."""

    _some_target = field_validator("targets")(some_target)

    @model_validator(mode="after")
    def _set_together(self) -> Self:
        if (self.targets is None) != (self.feedforward is None):
            raise ValueError("targets and feedforward are set together or not at all; set both, or leave both out")
        if not set(self.feedforward or ()) <= set(self.targets or ()):
            raise ValueError(f"feedforward {self.feedforward} must be among targets {self.targets}; add them there")
        return self


class PromptConfig(Section):
    """Learned vectors in front of the embedded text (prompt tuning, arXiv 2104.08691), starting as those of random words."""

    name: Literal["prompt"] = "prompt"
    """The method."""
    num_virtual_tokens: PositiveInt = 20
    """How many."""


class PTuningConfig(Section):
    """Prompt tuning whose vectors come from a small network (P-tuning, arXiv 2103.10385)."""

    name: Literal["p_tuning"] = "p_tuning"
    """The method."""
    num_virtual_tokens: PositiveInt = 20
    """How many."""
    hidden_size: PositiveInt = 128
    """Width of the network's two hidden layers."""


class PrefixConfig(Section):
    """Learned keys and values in front of those of every layer (prefix tuning, arXiv 2101.00190)."""

    name: Literal["prefix"] = "prefix"
    """The method."""
    num_virtual_tokens: PositiveInt = 20
    """How many."""
    projection_size: PositiveInt | None = None
    """Width of a network that makes them while training. None: they are trained themselves."""


class AdapterConfig(Section):
    """Small bottleneck networks after the sublayers of each block (Houlsby et al., arXiv 1902.00751)."""

    name: Literal["adapter"] = "adapter"
    """The method."""
    size: PositiveInt = 64
    """Width of the bottleneck."""
    placement: Literal["houlsby", "pfeiffer"] | None = None
    """`houlsby`: after attention and after the feed-forward layer; `pfeiffer` (arXiv 2005.00247): after the latter only. None: houlsby, or
    where `targets` says."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Between the two layers."""
    targets: tuple[str, ...] | None = None
    """Linear layers that an adapter follows. None: the last ones of attention and feed-forward layer, known for the usual architectures."""

    _some_target = field_validator("targets")(some_target)

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.placement is not None and self.targets is not None:
            raise ValueError(
                "placement has no effect beside targets, which says where adapters go; leave one of them out"
            )
        return self


MethodConfig = Annotated[
    FullConfig
    | HeadConfig
    | BitfitConfig
    | LoraConfig
    | DoraConfig
    | RsloraConfig
    | QloraConfig
    | VeraConfig
    | Ia3Config
    | PromptConfig
    | PTuningConfig
    | PrefixConfig
    | AdapterConfig,
    Field(discriminator="name"),
]
