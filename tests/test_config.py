"""The settings themselves: their rules, their documentation, their YAML form and their JSON schema."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.config import (
    AdapterConfig,
    ClassificationData,
    FullConfig,
    HeadConfig,
    Ia3Config,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    QloraConfig,
    RunConfig,
    TrainConfig,
    VeraConfig,
)
from trainer.resolve import config_to_yaml, json_schema, load_config
from trainer.resolve.fields import fields_of

CONFIGS = Path(__file__).resolve().parent.parent / "recipes" / "configs"
TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["none", "null", "no", "1e-4", "3", "a,b", "[a]", "'x'", "#", "~"])
)
FRACTIONS = st.floats(0.01, 0.4)
RATES = st.floats(1e-12, 1e3)
METHODS = st.one_of(
    st.just(FullConfig()),
    st.just(HeadConfig()),
    st.builds(
        LoraConfig,
        rank=st.integers(1, 2**40),
        alpha=RATES,
        dropout=FRACTIONS,
        targets=st.one_of(st.just("all-linear"), st.lists(TEXTS, min_size=1, max_size=3).map(tuple)),
    ),
)
RUN_CONFIGS = st.builds(
    RunConfig,
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,9}\Z"),
    run_dir=st.none() | TEXTS.filter(lambda text: "\0" not in text).map(Path),
    model=st.builds(ModelConfig, source=TEXTS, dropout=st.none() | FRACTIONS, trust_remote_code=st.booleans()),
    method=METHODS,
    data=st.builds(
        ClassificationData,
        subset=st.none() | TEXTS,
        text_pair=st.none() | TEXTS,
        labels=st.none() | st.lists(TEXTS, min_size=2, max_size=4, unique=True).map(tuple),
        validation_fraction=FRACTIONS,
        split_seed=st.integers(),
    ),
    optim=st.builds(
        OptimConfig, peak_lr=st.none() | RATES, max_grad_norm=st.none() | RATES, betas=st.tuples(FRACTIONS, FRACTIONS)
    ),
    train=st.builds(TrainConfig, max_steps=st.integers(1, 10**9), patience=st.none() | st.integers(1, 9)),
    probe=st.none() | st.builds(ProbeConfig, folder=st.just(Path("none")), steps=st.integers(1, 9)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@settings(max_examples=150, deadline=None)
@given(config=RUN_CONFIGS)
def test_stored_config_reads_back_exactly(folder: Path, config: RunConfig) -> None:
    path = folder / "config.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@settings(max_examples=50, deadline=None)
@given(config=RUN_CONFIGS)
def test_stored_config_is_yaml_with_the_same_meaning_for_any_reader(config: RunConfig) -> None:
    assert yaml.safe_load(config_to_yaml(config)) == json.loads(config.model_dump_json())


def test_every_setting_is_documented() -> None:
    leaves = fields_of(RunConfig).leaves
    assert len(leaves) > 50
    undocumented = [name for name, leaf in leaves.items() for field in leaf.variants.values() if not field.description]
    assert undocumented == []


def test_config_is_frozen() -> None:
    config = RunConfig(name="x")
    with pytest.raises(ValidationError):
        config.name = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        (RunConfig, {"name": "../x"}, "name"),
        (RunConfig, {"name": "x", "unknown": 1}, "unknown"),
        (TrainConfig, {}, "exactly one must be set"),
        (TrainConfig, {"num_epochs": 1, "max_steps": 1}, "exactly one must be set"),
        (ClassificationData, {"validation_fraction": 0.6, "test_fraction": 0.4}, "must be below 1"),
        (ClassificationData, {"validation_fraction": 0.0}, "must be above 0"),
        (ClassificationData, {"labels": ("a", "a")}, "must differ"),
        (ClassificationData, {"labels": ("a",)}, "at least two"),
        *((kind, {"targets": ()}, "at least one layer") for kind in (LoraConfig, VeraConfig, AdapterConfig)),
        (Ia3Config, {"targets": (), "feedforward": ()}, "at least one layer"),
        (LoraConfig, {"rank": 0}, "greater than 0"),
        (LoraConfig, {"alpha": 0}, "greater than 0"),
        (QloraConfig, {"quantize": "int8", "double_quantization": False}, "have no effect with quantize=int8"),
        (QloraConfig, {"quantize": "int8", "compute_dtype": "bf16"}, "have no effect with quantize=int8"),
        (AdapterConfig, {"placement": "houlsby", "targets": ("query",)}, "placement has no effect beside targets"),
        (LoraConfig, {"dropout": 1.0}, "dropout"),
        (OptimConfig, {"peak_lr": float("nan")}, "peak_lr"),
        (OptimConfig, {"layer_decay": 0.0}, "layer_decay"),
    ],
)
def test_impossible_values_are_refused(section: type, values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        section(**values)


def test_run_directory_is_named_after_the_run_unless_given() -> None:
    assert RunConfig(name="x").folder == Path("runs/x")
    assert RunConfig(name="x", run_dir=Path("/a")).folder == Path("/a")


def test_shipped_schema_is_current() -> None:
    shipped = json.loads((CONFIGS / "schema.json").read_text())
    assert shipped == json_schema(), "run `samestep config schema`"


def test_shipped_variants_follow_the_schema_and_name_it() -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert [path.name for path in files] == ["full_sst2_hub.yaml", "lora_sst2_hub.yaml", "pretrain_clm_hub.yaml"]
    validator = jsonschema.Draft202012Validator(json_schema())
    for path in files:
        text = path.read_text()
        assert text.startswith("# yaml-language-server: $schema=schema.json\n")
        recipe = path.stem.removesuffix("_hub")
        assert f"recipes/{recipe}.py --config recipes/configs/{path.name}" in text
        assert list(validator.iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize(
    "document",
    [
        {"optim": {"peek_lr": 1}},
        {"method": {"name": "lroa"}},
        {"train": {"max_steps": "many"}},
        {"mixed_precision": "bf16"},
        {"method": {"name": "full", "rank": 8}},
    ],
)
def test_schema_shows_mistakes_to_an_editor(document: object) -> None:
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(document)


@pytest.mark.parametrize(
    "document", [{}, {"method": {"rank": 8}}, {"method": {"name": "lora"}}, {"optim": {"betas": "0.9,0.99"}}]
)
def test_schema_accepts_partial_documents(document: object) -> None:
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(document)
