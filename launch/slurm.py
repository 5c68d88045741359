"""Options + template -> the text of a job script. Pure: writes nothing, starts nothing, imports no torch.

What reaches a `#SBATCH` line passes an allow-list; what reaches a command line is quoted. Values of settings may hold anything but
control characters, and arrive in the recipe as they were written.
"""

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launch.command import backend_names
from trainer.config import PRECISIONS
from trainer.errors import ConfigError
from trainer.run_folder import JOBS

TEMPLATE = Path(__file__).resolve().parent.parent / "slurm" / "train.sbatch"
MARK = "# (here `samestep submit` writes what it was asked for)"
WORD = r"[A-Za-z0-9][A-Za-z0-9._,:|&*+-]*"
PATH = r"[A-Za-z0-9._/~][A-Za-z0-9._/=+@,:~-]*"
RULES: Mapping[str, tuple[str, str]] = {
    "--nodes": (r"[1-9]\d{0,4}(-[1-9]\d{0,4})?", "must be a number or MIN-MAX; such as --nodes 4 or --nodes 1-4"),
    "--time": (
        r"\d+(-\d+(:\d+){0,2}|(:\d\d){0,2})",
        "must be minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS; such as --time 4:00:00",
    ),
    "recipe": (PATH, "must be of letters, digits and ._/=+@,:~-; rename the file"),
    "run_dir": (PATH, "must be of letters, digits and ._/=+@,:~-; set run_dir=PATH to another one"),
    "name": (WORD, "must be of letters, digits and ._-; set name=NAME to another one"),
    "--backend": ("|".join(backend_names()), f"must be one of {', '.join(backend_names())}"),
    "--precision": ("|".join(PRECISIONS), f"must be one of {', '.join(PRECISIONS)}; no is fp32"),
}
SECRET = r"(.*_)?(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY)(_(?!PATH|FILE).*)?"
"""Names of variables whose values must not stand in a script that others can read."""
Word = Annotated[str, Field(pattern=f"^{WORD}$")]


class Cluster(BaseModel):
    """What a cluster wants of every job: ~/.config/samestep/clusters/NAME.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: Word | None = None
    """Queue."""
    account: Word | None = None
    """Who pays."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that nodes must have."""
    reservation: Word | None = None
    """Nodes set aside."""
    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = None
    """Of each node, such as 64G."""
    cpus_per_rank: Annotated[int, Field(ge=1)] = 1
    """Cores of each rank, at least."""
    modules: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/+-]*$")], ...] = ()
    """For `module load`, in order."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    """Variables for the job, such as SAMESTEP_CACHE, HF_HOME or NCCL_SOCKET_IFNAME."""
    container_image: Annotated[str, Field(pattern=f"^{PATH}$")] | None = None
    """srun starts the ranks in it (pyxis); samestep is needed outside of it too."""
    container_mounts: Annotated[str, Field(pattern=f"^{PATH}$")] | None = None
    """Folders to mount, FROM:TO, separated by commas."""


@dataclass(frozen=True)
class Submission:
    """What `samestep submit` was asked for."""

    recipe: Path
    name: str
    """Of the run; the job's name in the queue."""
    run_dir: str
    """Of an array's tasks: this with -0, -1, ... at its end."""
    variants: tuple[tuple[str, ...], ...] = ()
    """Of an array: each task's own overrides. Empty: one job."""
    overrides: tuple[str, ...] = ()
    configs: tuple[Path, ...] = ()
    backend: str | None = None
    precision: str = "no"
    nodes: str = "1"
    gpus_per_node: int = 0
    ranks_per_node: int = 1
    """Without GPUs."""
    time_limit: str | None = None
    max_restarts: int = 1000
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def run_dirs(self) -> tuple[str, ...]:
        """Of every task."""
        return tuple(f"{self.run_dir}-{number}" for number in range(len(self.variants))) or (self.run_dir,)

    def config_copies(self, folder: str) -> list[tuple[Path, str]]:
        """Each --config file, and where its copy lies for the run in `folder`: the job must not see later changes."""
        return [(path, f"{folder}/{JOBS}/config-{number}-{path.name}") for number, path in enumerate(self.configs)]

    def world_sizes(self) -> tuple[int, ...]:
        """The fewest and the most ranks it may start with; nothing where `nodes` is not a number or two."""
        ranks = self.gpus_per_node or self.ranks_per_node
        counts = self.nodes.split("-") if re.fullmatch(RULES["--nodes"][0], self.nodes) else []
        return tuple(sorted({int(count) * ranks for count in counts}))


def script_text(asked: Submission, template: str) -> str:
    """The template with this submission's options in place of its own, and its arguments. ConfigError for what cannot stand in it."""
    problems = list(problems_of(asked))
    if problems:
        raise ConfigError(*problems)
    options = directives(asked)
    lines: list[str] = []
    for line in template.splitlines():
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(=.*)?", line)
        if found and found.group(1) in options:
            line = directive(found.group(1), options.pop(found.group(1)))
        lines += [*(directive(*option) for option in options.items()), "", *settings(asked)] if line == MARK else [line]
    return "\n".join(lines) + "\n"


def problems_of(asked: Submission) -> Iterator[str]:
    """Of each word that would stand in the script, with the rule and the fix."""
    named: list[tuple[str, str | None]] = [("--nodes", asked.nodes), ("recipe", str(asked.recipe))]
    named += [("--time", asked.time_limit), ("run_dir", asked.run_dir), ("name", asked.name)]
    named += [("--backend", asked.backend), ("--precision", asked.precision)]
    for name, value in named:
        pattern, rule = RULES[name]
        if value is not None and not re.fullmatch(pattern, value):
            yield f"{name} ({value!r}): {rule}"
    for name in asked.cluster.environment:
        if re.fullmatch(SECRET, name, re.IGNORECASE):
            yield (
                f"environment.{name} of the cluster's profile: a secret must not stand in a job script; take it out and "
                f"`export {name}=...` where you submit, from where sbatch passes it on"
            )
    if asked.cluster.container_mounts and not asked.cluster.container_image:
        yield f"container_mounts ({asked.cluster.container_mounts!r}): has no effect without container_image; set both or none"
    words = [
        *asked.overrides,
        *itertools.chain(*asked.variants),
        *map(str, asked.configs),
        *asked.cluster.environment.values(),
    ]
    for word in words:
        if not word.isprintable():
            yield f"argument ({word!r}): must be one line without control characters; put long values into a --config file"


def directives(asked: Submission) -> dict[str, str]:
    """Options of sbatch by name."""
    cluster = asked.cluster
    folder = f"{asked.run_dir}-%a" if asked.variants else asked.run_dir
    options: dict[str, Any] = {
        "job-name": asked.name,
        "nodes": asked.nodes,
        "mincpus": (asked.gpus_per_node or asked.ranks_per_node) * cluster.cpus_per_rank,
        "gpus-per-node": asked.gpus_per_node or None,
        "time": asked.time_limit,
        "signal": f"B:USR1@{lead_s(asked.time_limit)}",
        "output": f"{folder}/{JOBS}/job-%j.out",
        "array": f"0-{len(asked.variants) - 1}" if asked.variants else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "mem": cluster.memory,
    }
    return {name: str(value) for name, value in options.items() if value is not None}


def lead_s(time_limit: str | None) -> int:
    """Seconds of warning before the time limit: a tenth of it, from 20 s to 3 minutes. Slurm may give it up to a minute earlier."""
    days, _, clock = (time_limit or "1-0").rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, *[*parts, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return min(max(total // 10, 20), 180)


def directive(name: str, value: str) -> str:
    """One line for sbatch."""
    return f"#SBATCH --{name}={value}"


def settings(asked: Submission) -> Iterator[str]:
    """The lines between sbatch's options and the script proper."""
    cluster = asked.cluster
    for name, value in cluster.environment.items():
        yield f"export {name}={shlex.quote(value)}"
    for module in cluster.modules:
        failed = f"samestep: module load {module} failed; correct modules in the profile of the cluster"
        yield f"module load {module} || {{ echo '{failed}' >&2; exit 2; }}"
    if cluster.container_image:
        mounts = f" --container-mounts={cluster.container_mounts}" if cluster.container_mounts else ""
        yield "# Inside too, paths are relative to where the job was submitted; pyxis would start in the image's own directory."
        yield f'srun_options=(--container-image={cluster.container_image}{mounts} --container-workdir="$PWD")'
    if asked.backend:
        yield f"SAMESTEP_BACKEND={asked.backend}"
    yield f"SAMESTEP_PRECISION={asked.precision}"
    if not asked.gpus_per_node:
        yield f"SAMESTEP_RANKS_PER_NODE={asked.ranks_per_node}"
    yield f"SAMESTEP_MAX_RESTARTS={asked.max_restarts}"
    words = [str(asked.recipe), *asked.overrides]
    yield f"set -- {shlex.join(words if asked.variants else [*words, *config_words(asked, asked.run_dir)])}"
    if asked.variants:
        yield "case $SLURM_ARRAY_TASK_ID in # each task of the array has a run directory and settings of its own"
        for number, (folder, varied) in enumerate(zip(asked.run_dirs, asked.variants, strict=True)):
            own = [f"run_dir={folder}", *varied, *config_words(asked, folder)]
            yield f'  {number}) set -- "$@" {shlex.join(own)} ;;'
        yield "esac"


def config_words(asked: Submission, folder: str) -> list[str]:
    """The copies of the --config files as arguments."""
    return [word for _, copy in asked.config_copies(folder) for word in ("--config", copy)]


def variants_of(array: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Every combination of `key=v1,v2,...` words, as overrides. ConfigError for a word that is none."""
    choices = []
    for word in array:
        key, _, values = word.partition("=")
        if not re.fullmatch(r"[a-z_.]+", key) or not all(values.split(",")):
            raise ConfigError(
                f"--array ({word!r}): must be KEY=VALUE,VALUE,...; such as --array optim.peak_lr=1e-3,5e-4"
            )
        choices.append([f"{key}={value}" for value in values.split(",")])
    return tuple(itertools.product(*choices)) if choices else ()


def load_cluster(name: str, home: Path) -> Cluster:
    """The profile NAME. ConfigError where there is none, or something in it is wrong."""
    folder = home / ".config" / "samestep" / "clusters"
    path = folder / f"{name}.yaml"
    if not re.fullmatch(WORD, name) or not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.yaml"))) or "none yet"
        raise ConfigError(f"--cluster ({name!r}): there is no {path}; profiles there: {known}")
    try:
        return Cluster.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: must be YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        problems = [
            f"{path}: {'.'.join(map(str, found['loc']))} ({found['input']!r}): {found['msg']}"
            for found in error.errors()
        ]
        raise ConfigError(*problems) from None
