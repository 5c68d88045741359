"""Every mistake is found, all at once, each with its place, the rule and the fix."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.resolve.cases import DEFAULTS, FULL, problems_of, resolved, write
from trainer.config import RunConfig, check_world
from trainer.errors import ConfigError
from trainer.resolve import load_config, resolve
from trainer.resolve.fields import fields_of
from trainer.resolve.inputs import input_problems
from trainer.resolve.suggest import SYNONYMS


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("optim.peek_lr=1", ["optim.peek_lr (1) on the command line", "did you mean `optim.peak_lr`?"]),
        ("peak_lr=1", ["`optim.peak_lr`"]),
        ("train.peak_lr=1", ["`optim.peak_lr`"]),
        ("optim.lr=1", ["`optim.peak_lr`"]),
        ("learning_rate=1", ["`optim.peak_lr`"]),
        ("batch_size=1", ["`train.global_batch_size`"]),
        ("epochs=1", ["`train.num_epochs`"]),
        ("lora_alpha=1", ["`method.alpha`"]),
        ("method.rnk=1", ["`method.rank`"]),
        ("dropout=0", ["`model.dropout` or `method.dropout`"]),
        ("trian.seed=1", ["`train.seed`"]),
        ("train.seed.x=1", ["`train.seed`"]),
        ("zzzz=1", ["unknown setting", "--help"]),
        ("optim.peak_lr=fast", ["(fast) on the command line: must be a number or none; the recipe has 0.001"]),
        ("train.max_steps=2.5", ["must be a whole number or none"]),
        ("train.seed=none", ["must be a whole number;"]),
        ("data.group_by_length=maybe", ["must be true or false"]),
        ("optim.schedule=Linear", ["one of linear, cosine, constant", "did you mean optim.schedule=linear?"]),
        ("optim.betas=0.9", ["must be 2 values"]),
        ("optim.betas=[0.9, [1]]", ["optim.betas (nested values) on the command line: must be 2 values"]),
        ("optim.betas=0.9,1.0", ["must be below 1"]),
        ("optim.eps=-1", ["optim.eps (-1) on the command line: must be above 0"]),
        ("optim.peak_lr=nan", ["must be a finite number"]),
        ("optim.warmup_fraction=2", ["must be at most 1"]),
        ("optim=3", ["is a section", "optim.peak_lr"]),
        ("name=a/b", ["name (a/b) on the command line: must match"]),
        ("run_dir=", ["must be a path"]),
        ("method.name=lroa", ["one of full, head, bitfit, lora", "did you mean method.name=lora?"]),
        ("method=[a]", ["one of full, head, bitfit, lora"]),
        ("method.rank=0", ["method.rank (0) on the command line: must be above 0"]),
        ("method.targets=[]", ["method.targets", "needs at least one layer name"]),
        ("train.max_steps=5", ["set the other to none", "train.max_steps is set on the command line"]),
        ("data.validation_fraction=0.9", ["must be below 1"]),
        ("foo", ["foo on the command line: a setting is written section.key=value"]),
        ("=3", ["a setting is written section.key=value"]),
        ("--optim.peak_lr=3", ["without dashes: optim.peak_lr=3"]),
        ("--config", ["needs a file"]),
        ("mixed_precision=bf16", ["belongs to the accelerate configuration", "samestep run", "--mixed_precision bf16"]),
        ("train.precision=bf16", ["belongs to the accelerate configuration"]),
        ("train.bf16=true", ["belongs to the accelerate configuration"]),
        ("num_processes=2", ["belongs to the accelerate configuration", "--processes 2"]),
        ("fsdp_config.fsdp_version=1", ["belongs to the accelerate configuration"]),
        ("zero_stage=3", ["belongs to the accelerate configuration"]),
        ("backend=fsdp", ["--backend fsdp"]),
        ("--mixed_precision=bf16", ["belongs to the accelerate configuration"]),
        ("train.gradient_accumulation_steps=4", ["derived", "train.micro_batch_size"]),
    ],
)  # fmt: skip
def test_mistake_names_the_rule_and_the_fix(argument: str, words: list[str]) -> None:
    (problem,) = problems_of(argument)
    assert [word for word in words if word not in problem] == [], problem
    assert "pydantic" not in problem
    assert "\n" not in problem


def test_a_setting_of_another_method_is_an_error_that_names_its_method() -> None:
    (problem,) = problems_of("method.rank=8", defaults=FULL)
    assert problem == (
        "method.rank (8) on the command line: belongs to lora, dora, rslora, qlora or vera, and method.name is full; "
        "set method.name=lora or leave out method.rank"
    )
    assert "belongs to lora" in problems_of("method=head", "method.rank=8")[0]


CLM = ["model.task=clm", "data.kind=stream", "train.metric=loss", "train.num_epochs=none", "train.max_steps=1"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["data.validation=v.csv", "data.validation_fraction=0.2"], "data.validation_fraction (0.2)"),
        (["data.test=t.csv", "data.test_fraction=0.2"], "data.test_fraction (0.2)"),
        (["data.subset=sst2"], "unless data.source is a hub dataset"),
        (["optim.schedule=constant", "optim.min_lr_fraction=0.1"], "with optim.schedule=constant"),
        (["train.max_skipped_steps=3"], "unless train.on_nonfinite or train.on_spike is skip"),
        (
            ["train.on_spike=rollback", "train.max_skipped_steps=3"],
            "unless train.on_nonfinite or train.on_spike is skip",
        ),
        (
            ["train.on_nonfinite=skip", "train.max_rollbacks=5"],
            "unless train.on_nonfinite or train.on_spike is rollback",
        ),
        (["train.spike_factor=5"], "with train.on_spike=ignore"),
        ([*CLM, "data.noise_fraction=0.2"], "unless data.objective is mlm or mlm_nsp"),
        ([*CLM, "data.mean_span=4"], "unless data.objective is span_corruption or infilling"),
        ([*CLM, "data.whole_words=yes"], "unless data.objective is mlm or mlm_nsp or mlm_sop"),
        (["method=head", "optim.layer_decay=0.9"], "with method.name=head"),
        (["method=head", "model.gradient_checkpointing=yes"], "with method.name=head"),
    ],
)
def test_a_setting_without_effect_is_an_error(argv: list[str], words: str) -> None:
    (problem,) = problems_of(*argv)
    assert words in problem
    assert "has no effect" in problem


@pytest.mark.parametrize(
    "argv",
    [
        ["train.on_spike=skip", "train.max_skipped_steps=50", "train.spike_factor=5"],
        ["train.on_nonfinite=skip", "train.max_skipped_steps=50"],
        ["train.on_spike=rollback", "train.max_rollbacks=5"],
        ["train.on_nonfinite=rollback", "train.max_rollbacks=5"],
    ],
)
def test_a_cap_has_effect_where_either_policy_counts_by_it(argv: list[str]) -> None:
    assert resolved(*argv).config.train.model_fields_set


def test_a_later_layer_may_make_an_earlier_setting_idle(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", "optim: {schedule: linear, min_lr_fraction: 0.1}\n")
    assert resolved("--config", path, "optim.schedule=constant").config.optim.schedule == "constant"


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.yaml", "optim:\n  peek_lr: 1\n  eps: [1, 2]\ntrain: {global_batch_size: 0}\nfsdp_config: {a: 1}\n"
    )
    problems = problems_of("--config", path, "--config", str(tmp_path / "y.yaml"), "method.rank=x", "foo", "--bar")
    assert len(problems) == 8
    for words in (
        f"optim.peek_lr (1) in {path} line 2",
        f"optim.eps ([1, 2]) in {path} line 3: must be a number",
        f"train.global_batch_size (0) in {path} line 4: must be above 0; the recipe has 8",
        f"fsdp_config (nested values) in {path} line 5: belongs to the accelerate configuration",
        f"there is no such file; did you mean {path}?",
    ):
        assert any(words in problem for problem in problems), words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 3\n", "must hold a mapping"),
        ("optim\n", "must hold a mapping"),
        ("optim: [1\ntrain: 3\n", "line 2: not valid YAML"),
        ("a: b: c\n", "line 1: not valid YAML"),
        ("--- {}\n--- {}\n", "not valid YAML"),
        ("optim: *x\n", "line 1: not valid YAML"),
        ("train:\n  seed: 1\n  seed: 1\n", "train.seed (1) in"),
        ("train.seed: 1\ntrain:\n  seed: 2\n", "is set twice, first in line 1"),
        ("optim: {peak_lr: {a: 1}}\n", "optim.peak_lr (nested values)"),
        ("optim: {betas: [[1], 2]}\n", "must be 2 values"),
        ("optim: &a {peak_lr: *a}\n", "optim.peak_lr (nested values)"),
        ("? [a]\n: 1\n", "unknown setting"),
        ("optim: {<<: {eps: 1}}\n", "merge keys are not read"),
        ("\0", "cannot be read"),
    ],
)
def test_broken_yaml_is_one_message_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    (problem,) = problems_of("--config", write(tmp_path / "x.yaml", text))
    assert words in problem
    assert "x.yaml" in problem


def test_unreadable_files_are_messages(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "not YAML text" in problems_of("--config", str(tmp_path / "latin.yaml"))[0]
    assert "cannot be read" in problems_of("--config", str(tmp_path))[0]
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nothing.yaml")


def test_setting_twice_on_the_command_line_is_an_error_unless_it_is_the_same() -> None:
    assert "is set twice: 1 and 2" in problems_of("train.seed=1", "train.seed=2")[0]
    assert resolved("train.seed=1", "train.seed=1").config.train.seed == 1


def test_global_batch_smaller_than_the_world_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_world(DEFAULTS, 8) == []
    monkeypatch.setenv("WORLD_SIZE", "4")
    first, second = problems_of("train.global_batch_size=2", "peak_lr=1")
    assert "peak_lr" in first
    assert second.startswith("train.global_batch_size (2) is smaller than the number of processes (4);")


def test_a_subset_of_a_hub_dataset_has_effect_for_every_kind_of_data() -> None:
    for task, kind in (("clm", "instruct"), ("clm", "live"), ("seq2seq", "pairs")):
        chosen = [
            f"model.task={task}",
            f"data.kind={kind}",
            "train.metric=loss",
            "data.subset=en",
            "train.num_epochs=none",
        ]
        assert resolved(*chosen, "data.source=owner/name", "train.max_steps=1").config.data.subset == "en"  # type: ignore[union-attr]
        (problem,) = problems_of(*chosen, "data.source=chats.jsonl", "train.max_steps=1")
        assert problem.startswith(
            "data.subset (en) on the command line: has no effect unless data.source is a hub dataset"
        )


def test_mistakes_in_pairs_are_found_before_anything_loads(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", '{"text": "a", "target": "b"}\n{"text": "a", "target": ""}\n')
    chosen = ["model.task=seq2seq", "data.kind=pairs", f"data.source={path}", "train.metric=loss"]
    config = resolved(*chosen).config
    assert input_problems(config, ["model.source: not looked at here"]) == [
        f"{path}:2: column target is empty, and must hold text; correct them, or take them out"
    ]
    problems = input_problems(resolved(*chosen, "data.target=summary").config, ["model"])
    assert problems[0].startswith(f"data.target (summary): {path} has no such column")


def test_every_synonym_leads_to_an_existing_setting() -> None:
    assert [name for name in SYNONYMS if name not in fields_of(RunConfig).leaves] == []


NAMES = sorted(fields_of(RunConfig).leaves)
KEYS = st.one_of(
    st.sampled_from(NAMES), st.sampled_from(["method", "probe", "optim", "lr", "fsdp"]), st.text(max_size=8)
)
INTERESTING = [
    "none",
    "no",
    "1e999",
    "nan",
    "-1",
    "[a, [b]]",
    "[",
    "''",
    "lora",
    "head",
    "full",
    "a,b",
    "1e-4",
    "0.5",
    "\0",
]
WORDS = st.one_of(
    st.tuples(KEYS, st.sampled_from(INTERESTING) | st.text(max_size=8)).map("=".join),
    st.text(max_size=8),
    st.sampled_from(["--print-config", "--config=/nowhere", "--config", "--x"]),
)


def assert_says_something(error: ConfigError) -> None:
    assert error.problems
    assert all(problem.strip() for problem in error.problems)


@settings(max_examples=300, deadline=None)
@given(argv=st.lists(WORDS, max_size=5))
def test_any_arguments_give_a_config_or_a_config_error(argv: list[str]) -> None:
    try:
        assert isinstance(resolve(RunConfig, DEFAULTS, argv).config, RunConfig)
    except ConfigError as error:
        assert_says_something(error)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40) | st.lists(st.tuples(KEYS, st.text(max_size=6)).map(": ".join)).map("\n".join))
def test_any_yaml_gives_a_config_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        assert isinstance(resolve(RunConfig, DEFAULTS, ["--config", str(path)]).config, RunConfig)
    except ConfigError as error:
        assert_says_something(error)
