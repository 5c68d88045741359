"""slurm/train.sbatch from its first line to its last, with stand-ins for Slurm's commands and for the training. No Slurm needed."""

import os
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from launch.slurm import TEMPLATE

TOOLS = {
    "scontrol": """
echo "scontrol $*" >>"$CALLS"
if [[ $2 == hostnames ]]; then echo n1; exit; fi
if (($(grep -c "^scontrol $1" "$CALLS") <= BUSY)); then echo "controller is busy" >&2; exit 1; fi
if [[ $1 == show ]]; then echo "NodeName=n1 NodeAddr=10.0.0.1"; fi""",
    "squeue": 'echo "$END_TIME"',
    "scancel": 'echo "scancel $*" >>"$CALLS"; kill -9 "$(cat "$CALLS.training")"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "accelerate": """
echo accelerate >>"$CALLS"
if ((BUSY_S)); then echo $$ >"$CALLS.training"; exec /bin/sleep "$BUSY_S"; fi""",
    "sleep": 'echo "sleep $1" >>"$CALLS"; if ((BUSY_S)); then /bin/sleep 0.3; fi',
    "samestep": """
echo "samestep $*" >>"$CALLS"
case $2 in
  begin) printf "%s\\n" "$RUN" "$RUN/log" config.yaml ;;
  check) exit "$CHECKED" ;;
  end) echo "$VERDICT" ;;
esac""",
}


def run_script(
    folder: Path,
    *,
    checked: int = 0,
    restarts: int = 0,
    verdict: str = "finished",
    busy: int = 0,
    busy_s: int = 0,
    end_time: str = "N/A",
) -> tuple[int, str, str]:
    """(exit code, calls of the stand-ins, what was printed). busy: so many calls of scontrol show, and of requeue, fail first.

    busy_s: how long training takes, whatever it is asked for; end_time: of the job, as squeue says it.
    """
    tools, run = folder / "tools", folder / "run"
    for place in (tools, run):
        place.mkdir()
    for name, text in TOOLS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text.strip()}\n")
        (tools / name).chmod(0o755)
    (folder / "calls").touch()
    environ = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CALLS": str(folder / "calls"), "RUN": str(run)}
    environ |= {"CHECKED": str(checked), "VERDICT": verdict, "BUSY": str(busy), "SLURM_RESTART_COUNT": str(restarts)}
    environ |= {"BUSY_S": str(busy_s), "END_TIME": end_time}
    environ |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", str(TEMPLATE), "recipe.py"], cwd=folder, env=environ, capture_output=True, text=True, timeout=60
    )
    return done.returncode, (folder / "calls").read_text(), done.stdout + done.stderr


def test_nodes_that_are_ready_train_and_the_verdict_ends_the_job(tmp_path: Path) -> None:
    code, calls, printed = run_script(tmp_path)
    assert code == 0, printed
    order = [line.split()[0] + line.partition("job")[2][:6] for line in calls.splitlines()]
    assert order == ["scontrol", "scontrol", "samestep begin", "samestep check", "accelerate", "samestep end /"]
    assert "--unready" not in calls


@pytest.mark.parametrize(
    ("checked", "restarts", "verdict", "code", "is_requeued"),
    [
        (3, 0, "requeue", 3, False),  # a first start: whoever submitted it is still there
        (3, 2, "requeue", 0, True),
        (127, 2, "requeue", 0, True),  # a node that does not see the environment
        (3, 2, "stuck", 3, False),
    ],
)
def test_a_restart_on_nodes_that_are_not_ready_is_decided_like_one_that_failed(
    checked: int, restarts: int, verdict: str, code: int, is_requeued: bool, tmp_path: Path
) -> None:
    found, calls, printed = run_script(tmp_path, checked=checked, restarts=restarts, verdict=verdict)
    assert found == code, printed
    assert "accelerate" not in calls
    assert ("--max-restarts 1000 --unready" in calls) == (restarts > 0)
    assert ("scontrol requeue 7" in calls) == is_requeued


def test_a_busy_controller_is_asked_again_and_one_that_stays_so_is_named(tmp_path: Path) -> None:
    (tmp_path / "busy").mkdir()
    code, calls, printed = run_script(tmp_path / "busy", verdict="requeue", busy=3)
    assert code == 0, printed
    assert calls.count("scontrol requeue 7") == 4
    assert calls.count("sleep") == 3 + 2  # of `show`, whose first call asks for the host names
    (tmp_path / "gone").mkdir()
    code, calls, printed = run_script(tmp_path / "gone", busy=9)
    assert code == 1
    assert "samestep: `scontrol show node n1` failed five times" in printed
    assert "samestep job begin" not in calls


def test_training_that_is_busy_at_the_time_limit_is_ended_before_slurm_ends_the_script(tmp_path: Path) -> None:
    end = datetime.now() + timedelta(seconds=14)
    code, calls, printed = run_script(
        tmp_path, busy_s=50, verdict="requeue", end_time=end.isoformat(timespec="seconds")
    )
    assert code == 0, printed
    assert datetime.now() < end
    assert "the time limit is here and training has not ended" in printed
    assert [line for line in calls.splitlines() if "sleep" not in line][-3:] == [
        "scancel --signal=KILL 7",
        f"samestep job end {tmp_path / 'run'} --max-restarts 1000",
        "scontrol requeue 7",
    ]
