"""Job scripts: what stands in them, what is refused, and what bash makes of them. No Slurm needed."""

import itertools
import json
import shlex
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from launch.cli import main
from launch.slurm import MARK, TEMPLATE, Cluster, Submission, lead_s, load_cluster, script_text, variants_of
from launch.slurm import settings as settings_of
from trainer.data.assets import cache_folder
from trainer.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
PLAIN = Submission(recipe=Path("recipes/lora_sst2.py"), name="lora_sst2", run_dir="runs/lora_sst2")
PROFILE = Cluster(
    partition="gpu",
    account="team-7",
    modules=("cuda/12.8", "gcc"),
    environment={"HF_HOME": "/shared/hf cache", "NCCL_DEBUG": "WARN"},
    container_image="/images/torch.sqsh",
    container_mounts="/shared:/shared",
    memory="64G",
)
CASES = {
    "plain": PLAIN,
    "gpus": Submission(
        recipe=Path("recipes/pretrain_clm.py"),
        name="clm",
        run_dir="/shared/runs/clm",
        overrides=("train.seed=1", "data.sources=[a b, 'c']"),
        configs=(Path("my.yaml"),),
        backend="fsdp",
        precision="bf16",
        nodes="2-4",
        gpus_per_node=8,
        time_limit="4:00:00",
        cluster=PROFILE,
    ),
    "array": Submission(
        recipe=Path("recipes/lora_sst2.py"),
        name="lora_sst2",
        run_dir="runs/lora_sst2",
        variants=(("optim.peak_lr=1e-3",), ("optim.peak_lr=5e-4",)),
        max_restarts=3,
    ),
}


def script_of(asked: Submission) -> str:
    return script_text(asked, TEMPLATE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_what_was_reviewed(name: str) -> None:
    """After a change: look at what the failure shows, then `python -m tests.slurm.test_script`."""
    assert script_of(CASES[name]) == (GOLDEN / f"{name}.sbatch").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*CASES, "template"])
def test_scripts_are_clean_bash(name: str, tmp_path: Path) -> None:
    path = tmp_path / "script.sh"
    path.write_text(TEMPLATE.read_text() if name == "template" else script_of(CASES[name]))
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    for words in (["bash", "-n", str(path)], [str(shellcheck), str(path)]):
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_options_of_sbatch_come_before_the_first_command() -> None:
    for asked in CASES.values():
        lines = script_of(asked).splitlines()
        first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
        assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
        assert MARK not in lines


HOSTILE = ("a\nb", "a;b", "$(touch x)", "`touch x`", "a b", "a'b", 'a"b', "a\\b", "-x", "", "a#b", "a%b", "é")


@pytest.mark.parametrize("field", ["recipe", "run_dir", "nodes", "time_limit", "name", "backend", "precision"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_refused(field: str, text: str) -> None:
    asked = Submission(**{**vars(PLAIN), field: Path(text) if field == "recipe" else text})
    if field == "recipe" and text == "":
        return  # Path("") is the working directory, which is no recipe
    with pytest.raises(ConfigError):
        script_of(asked)


@pytest.mark.parametrize(
    "field",
    ["partition", "account", "qos", "constraint", "reservation", "memory", "container_image", "container_mounts"],
)
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_profiles_are_refused(field: str, text: str, tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "samestep" / "clusters"
    folder.mkdir(parents=True)
    (folder / "here.yaml").write_text(json.dumps({field: text}))
    with pytest.raises(ConfigError, match=r"here\.yaml"):
        load_cluster("here", tmp_path)


@pytest.mark.parametrize(
    "text", ["modules: [a; b]", "modules: ['a\\n']", "environment: {'A B': c}", "partitoin: x", "- a", "{"]
)
def test_profiles_with_mistakes_are_refused(text: str, tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "samestep" / "clusters"
    folder.mkdir(parents=True)
    (folder / "here.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"here\.yaml"):
        load_cluster("here", tmp_path)
    with pytest.raises(ConfigError, match="profiles there: here"):
        load_cluster("there", tmp_path)


@pytest.mark.parametrize("field", ["modules", "cpus_per_rank", "environment"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_in_a_profile_are_refused_or_quoted(field: str, text: str) -> None:
    try:
        made = {"modules": (text,), "cpus_per_rank": text, "environment": {"A": text}}[field]
        script = script_of(replace(PLAIN, cluster=Cluster.model_validate({field: made})))
    except (ValidationError, ConfigError):
        return
    assert f"export A={shlex.quote(text)}" in script.splitlines()


@pytest.mark.parametrize("field", ["name", "precision"])
def test_unknown_words_of_other_options_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=r"precision \('fp17'\): must be one of no|name \('-fp17'\)"):
        script_of(replace(PLAIN, **{field: "fp17" if field == "precision" else "-fp17"}))


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password", "TOKEN"), True).items(),
        *dict.fromkeys(("TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "HF_HOME", "MAX_TOKENS", "KEYS"), False).items(),
    ],
)
def test_secrets_do_not_stand_in_scripts(name: str, is_secret: bool) -> None:
    asked = replace(PLAIN, cluster=Cluster(environment={name: "hf_hidden"}))
    if not is_secret:
        assert f"export {name}=hf_hidden\n" in script_of(asked)
        return
    with pytest.raises(ConfigError, match=f"export {name}") as refused:
        script_of(asked)
    assert "hf_hidden" not in str(refused.value)


def test_mounts_without_an_image_are_refused() -> None:
    with pytest.raises(ConfigError, match="no effect without container_image"):
        script_of(replace(PLAIN, cluster=Cluster(container_mounts="/a:/b")))


def test_a_module_that_does_not_load_ends_the_job_and_is_named() -> None:
    lines = "\n".join(settings_of(replace(PLAIN, cluster=Cluster(modules=("gcc", "cuda/12.8")))))
    program = f"module() {{ [[ $2 == gcc ]]; }}\n{lines}\necho goes on"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "module load cuda/12.8 failed" in done.stderr


def test_relative_paths_mean_the_same_in_a_container() -> None:
    lines = "\n".join(settings_of(replace(PLAIN, cluster=Cluster(container_image="/images/torch.sqsh"))))
    program = f'cd /usr\n{lines}\nprintf "%s\\n" "${{srun_options[@]}}"'
    printed = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["--container-image=/images/torch.sqsh", "--container-workdir=/usr"]


printable = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=30
)


@settings(max_examples=60, deadline=None)
@given(st.lists(printable, max_size=4), st.lists(printable, min_size=2, max_size=2), printable)
def test_whatever_a_setting_holds_arrives_as_it_was_written(words: list[str], varied: list[str], variable: str) -> None:
    overrides = tuple(f"key={word}" for word in words)
    variants = tuple((f"other={word}",) for word in varied)
    asked = Submission(
        recipe=PLAIN.recipe,
        name="x",
        run_dir="runs/x",
        overrides=overrides,
        variants=variants,
        cluster=Cluster(environment={"SOME_VARIABLE": variable}),
    )
    text = script_of(asked)
    middle = text[text.index("\n\n", text.index("#SBATCH --signal")) : text.index("set -euo pipefail")]
    program = f'SLURM_ARRAY_TASK_ID=1\n{middle}\nprintf "%s\\0" "$SOME_VARIABLE" "$@"'
    printed = subprocess.run(["bash", "-uc", program], capture_output=True, text=True, check=True).stdout.split("\0")[
        :-1
    ]
    assert printed == [variable, str(PLAIN.recipe), *overrides, "run_dir=runs/x-1", *variants[1]]


@given(st.text(max_size=20))
def test_arguments_with_control_characters_are_refused_and_no_others(text: str) -> None:
    asked = Submission(**{**vars(PLAIN), "overrides": (f"a={text}",)})
    if text.isprintable():
        script_of(asked)
    else:
        with pytest.raises(ConfigError, match="control characters"):
            script_of(asked)


def test_an_array_is_every_combination() -> None:
    found = variants_of(["optim.peak_lr=1e-3,5e-4", "train.seed=0,1,2"])
    assert len(set(found)) == 6
    assert set(found) == {
        (f"optim.peak_lr={lr}", f"train.seed={seed}") for lr, seed in itertools.product(("1e-3", "5e-4"), "012")
    }
    assert variants_of([]) == ()
    for word in ("", "=1", "a=", "a=1,,2", "A B=1", "a"):
        with pytest.raises(ConfigError, match="--array"):
            variants_of([word])


@pytest.mark.parametrize(
    ("time_limit", "seconds"),
    [("4:00:00", 180), ("10", 60), ("1", 20), ("0:30", 20), ("10:30", 63), ("2-0", 180), ("0-1:30", 180), (None, 180)],
)
def test_the_warning_is_a_tenth_of_the_time_limit(time_limit: str | None, seconds: int) -> None:
    assert lead_s(time_limit) == seconds


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("no_slurm")
def test_without_slurm_the_script_is_shown_and_submitting_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", "recipes/lora_sst2.py", f"run_dir={tmp_path / 'run'}", "--nodes", "2"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--dry-run"])
    assert ended.value.code == 0
    assert "#SBATCH --nodes=2\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "sbatch is not here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "zero4"], "--backend (zero4): must be one of"),
        (["optim.peek_lr=1"], "did you mean `optim.peak_lr`"),
        (["--array", "optim.peak_lr=1e-3,high"], "optim.peak_lr"),
        (["--nodes", "many"], "--nodes ('many'): must be a number or MIN-MAX"),
        (["--precision", "fp17"], "--precision (fp17): must be one of no, bf16, fp16"),
        (["--precision", "no; touch x"], "--precision (no; touch x): must be one of"),
        (["--precision", "fp16", "--nodes", "2"], "needs a GPU"),
        (["--backend", "single", "--nodes", "1-2"], "--backend single runs one process, and 2 were asked for"),
        (["--backend", "ddp", "--nodes", "1-2"], "--backend (ddp): on CPU it needs at least 2 processes"),
        (
            ["--nodes", "8", "--gpus-per-node", "8"],
            "train.global_batch_size (32) is smaller than the number of processes (64)",
        ),
        (["data.source=nothing.csv"], "nothing.csv"),
        (["--array", "data.source=asset:sst,nothing.csv"], "nothing.csv"),
        (["--cluster", "moon"], "--cluster ('moon'): there is no"),
    ],
)
def test_mistakes_are_found_on_the_login_node(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAMESTEP_CACHE", str(cache_folder()))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["submit", "recipes/lora_sst2.py", "--dry-run", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


if __name__ == "__main__":
    for case, submission in CASES.items():
        (GOLDEN / f"{case}.sbatch").write_text(script_of(submission), encoding="utf-8")
