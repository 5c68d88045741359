"""The run directory's log: read back from disk, watched through real pipes and a real terminal."""

import json
import math
import os
import pty
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import ConfigError, SamestepError
from trainer.log import RunLog, json_line, lock_run_folder, start_run_folder, write_summary
from trainer.quiet import quiet_prints
from trainer.screen import announce, clock, eta_s, progress_words

ROOT = Path(__file__).parents[1]
VALUES = {"epoch": 0.5, "train/loss": 0.4312, "train/accuracy": 0.8, "train/lr": 8.1e-4, "samples_per_s": 92.4}


@pytest.fixture
def folder(tmp_path):
    start_run_folder(tmp_path / "run")
    return tmp_path / "run"


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


# metrics.jsonl and TensorBoard


def test_metrics_are_flat_strict_json_on_disk_at_once(folder):
    log = RunLog(folder, is_main=True, total_steps=10)
    log.record(VALUES, 5)
    log.record({"train/loss": math.nan, "train/grad_norm": math.inf, "count": np.int64(3), "note": "ü"}, 6)
    first, second = map(json.loads, lines_of(folder / "metrics.jsonl"))  # not closed yet
    log.close()
    assert first == {"step": 5, **VALUES}
    assert second == {"step": 6, "train/loss": None, "train/grad_norm": None, "count": 3, "note": "ü"}


def test_numbers_come_back_from_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(folder, is_main=True, total_steps=10)
    log.record({"train/loss": 0.5, "note": "words are not numbers"}, 1)
    log.record({"train/loss": 0.25, "eval/accuracy": 0.75}, 2)
    log.close()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "eval/accuracy"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]


def test_a_nested_value_is_refused():
    with pytest.raises(AssertionError, match="not a flat value"):
        json_line({"confusion": [[1, 2], [3, 4]]})


def test_other_ranks_write_and_print_nothing(folder, capfd):
    log = RunLog(folder, is_main=False, total_steps=10)
    log.say("hello")
    log.record(VALUES, 1)
    log.progress(1, VALUES)
    log.close()
    assert [path.name for path in folder.iterdir()] == ["log.txt"]
    assert (folder / "log.txt").read_text() == ""
    assert capfd.readouterr().out == ""


def test_a_second_log_continues_the_files_of_the_first(folder):
    for step in (1, 2):
        log = RunLog(folder, is_main=True, total_steps=2, start_step=step - 1)
        log.record({"train/loss": 1.0}, step)
        log.close()
        log.close()  # idempotent
    assert [json.loads(line)["step"] for line in lines_of(folder / "metrics.jsonl")] == [1, 2]


def test_a_full_disk_is_a_message_that_names_the_fix(folder):
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(folder, is_main=True, total_steps=1)
    with pytest.raises(SamestepError, match=r"metrics\.jsonl cannot be written: No space left.*run_dir=PATH"):
        log.record(VALUES, 1)
    with pytest.raises(SamestepError, match="No space left"):
        log.close()
    log.close()
    assert log.text.closed


# Screen


def test_without_a_terminal_progress_is_plain_lines_even_where_colour_is_forced(folder):
    code = """
        import sys; from pathlib import Path; from trainer.log import RunLog
        log = RunLog(Path(sys.argv[1]), is_main=True, total_steps=660)
        log.say("\\x1b[31mred\\x1b[0m [not markup]\\nsecond line")
        log.progress(120, {"train/loss": 0.43121, "train/lr": 8.1e-4, "samples_per_s": 92.4})
        log.close()
    """
    done = run_python(code, folder, FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout
    *said, progress = done.stdout.splitlines()
    assert said == ["red [not markup]", "second line"]
    assert progress.startswith("step 120/660  loss 0.4312  lr 8.1e-04  92 samples/s  eta 0:00:")
    assert lines_of(folder / "log.txt") == done.stdout.splitlines()


def test_on_a_terminal_a_bar_moves_below_the_lines_and_the_log_has_no_control_codes(folder):
    code = """
        import sys; from pathlib import Path; from trainer.log import RunLog
        log = RunLog(Path(sys.argv[1]), is_main=True, total_steps=20)
        for step in (10, 20):
            log.progress(step, {"train/loss": 1.0 / step, "train/lr": 1e-3, "samples_per_s": 50.0})
            log.say(f"validation at {step}")
        log.close()
    """
    main, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=other, stderr=other, env=environment)
    os.close(other)
    screen = b""
    try:
        while data := os.read(main, 65536):
            screen += data
    except OSError:  # Linux: the other side was closed
        pass
    assert child.wait(timeout=30) == 0, screen
    shown = screen.decode()
    assert "━" in shown
    assert "step 20/20" in shown
    assert "eta 0:00:00" in shown
    assert shown.rstrip().endswith("validation at 20")  # below the full bar
    log = (folder / "log.txt").read_text()
    assert "\x1b" not in log
    assert [line.split("  ")[0] for line in log.splitlines()] == [
        "step 10/20", "validation at 10", "step 20/20", "validation at 20",
    ]  # fmt: skip


def test_a_reader_that_goes_away_does_not_stop_the_training(folder):
    code = """
        import os, sys; from pathlib import Path; from trainer.log import RunLog
        log = RunLog(Path(sys.argv[1]), is_main=True, total_steps=3)
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        for step in (1, 2, 3):
            log.say(f"line {step}")
        log.close(); os._exit(0)
    """
    done = run_python(code, folder)
    assert done.returncode == 0, done.stderr
    assert lines_of(folder / "log.txt") == ["line 1", "line 2", "line 3"]


def test_text_that_the_screen_cannot_encode_is_escaped(folder):
    code = """
        import sys; from pathlib import Path; from trainer.log import RunLog
        log = RunLog(Path(sys.argv[1]), is_main=True, total_steps=3); log.say("世"); log.close()
    """
    done = run_python(code, folder, PYTHONIOENCODING="ascii")
    assert done.stdout == "\\u4e16\n", done.stderr
    assert (folder / "log.txt").read_text(encoding="utf-8") == "世\n"


def test_remaining_time_follows_the_speed_of_the_window():
    assert eta_s([(100.0, 500), (110.0, 520)], 600) == pytest.approx(40.0)
    assert eta_s([(100.0, 500)], 600) is None
    assert clock(74.4) == "0:01:14"
    assert clock(90_061) == "25:01:01"
    assert progress_words({"samples_per_s": 0.5}, None) == "0.5 samples/s"
    values = {
        "train/loss": 2.5,
        "train/bits_per_byte": 1.25,
        "tokens_per_s": 12,
        "tokens_seen": 34567,
        "train/padding": 0.01,
    }
    assert (
        progress_words(values, None)
        == "loss 2.5000 nats  1.2500 bits/byte  12 tokens/s  34,567 tokens seen  padding 1.00%"
    )


# Libraries


def test_library_chatter_is_in_the_log_and_off_the_screen(folder):
    code = """
        import sys; from pathlib import Path
        from trainer.quiet import quiet_libraries
        quiet_libraries()
        import logging, warnings
        import deepspeed, transformers
        from transformers.utils.logging import is_progress_bar_enabled
        transformers.utils.logging.get_logger("transformers.modeling").warning("before the run folder")
        from trainer.log import RunLog
        log = RunLog(Path(sys.argv[1]), is_main=True, total_steps=3)
        warnings.warn("a python warning")
        deepspeed.utils.logging.logger.warning("from deepspeed")
        logging.getLogger("peft.tuners").warning("from peft")
        logging.getLogger("accelerate").error("a real error")
        logging.getLogger("my.recipe").warning("from the recipe")
        transformers.utils.logging.get_logger("transformers.x").warning("from transformers")
        log.close()
        print(is_progress_bar_enabled())
    """
    done = run_python(code, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"
    assert done.stderr.splitlines() == ["ERROR accelerate: a real error", "WARNING my.recipe: from the recipe"]
    log = (folder / "log.txt").read_text()
    for words in (
        "before the run folder", "a python warning", "from deepspeed", "from peft", "a real error", "from the recipe",
        "from transformers",
    ):  # fmt: skip
        assert log.count(words) == 1, (words, log)


def test_what_is_announced_and_printed_before_the_run_folder_is_open_is_in_the_log_too(folder, capfd):
    announce("data  two lines\nof it", is_main=True)
    announce("another rank", is_main=False)
    with quiet_prints("deepspeed"):
        print("built successfully\n")
    with pytest.raises(ValueError), quiet_prints("deepspeed"):  # noqa: PT012
        print("before the failure")
        raise ValueError
    RunLog(folder, is_main=True, total_steps=1).close()
    assert capfd.readouterr().out == "data  two lines\nof it\n"
    assert lines_of(folder / "log.txt")[-4:] == [
        "data  two lines", "of it", "deepspeed: built successfully", "deepspeed: before the failure",
    ]  # fmt: skip


def test_libraries_that_were_imported_first_are_quiet_too(folder):
    code = """
        import sys; from pathlib import Path
        import deepspeed, transformers
        from trainer.quiet import quiet_libraries
        quiet_libraries()
        quiet_libraries()
        deepspeed.utils.logging.logger.warning("from deepspeed")
        transformers.utils.logging.get_logger("transformers.x").warning("from transformers")
        from trainer.log import RunLog
        RunLog(Path(sys.argv[1]), is_main=True, total_steps=3).close()
    """
    done = run_python(code, folder, DS_ACCELERATOR="cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert lines_of(folder / "log.txt") == [
        "WARNING DeepSpeed: from deepspeed", "WARNING transformers.x: from transformers",
    ]  # fmt: skip


# The folder


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    assert start_run_folder(tmp_path / "a" / "b") is None
    assert (tmp_path / "a" / "b").is_dir()


def test_earlier_runs_are_moved_aside_and_nothing_is_lost(tmp_path, capsys):
    folder = tmp_path / "run"
    for number in range(3):
        start_run_folder(folder)
        (folder / "config.yaml").write_text(f"number: {number}")
    assert (tmp_path / "run.1" / "config.yaml").read_text() == "number: 0"
    assert (tmp_path / "run.2" / "config.yaml").read_text() == "number: 1"
    assert (folder / "config.yaml").read_text() == "number: 2"
    assert f"was moved to {folder}.2" in capsys.readouterr().out


def test_a_run_that_stopped_before_its_first_metrics_counts_as_a_run(tmp_path):
    folder = tmp_path / "run"
    start_run_folder(folder)
    assert start_run_folder(folder) == tmp_path / "run.1"


def test_a_folder_that_holds_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("work of years")
    with pytest.raises(ConfigError, match=r"run_dir \(.*holds other things than a run, such as thesis\.tex"):
        start_run_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_used_as_it_is(tmp_path):
    assert start_run_folder(tmp_path) is None


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        start_run_folder(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"cannot be written: Not a directory; set run_dir=PATH"):
        start_run_folder(tmp_path / "file" / "run")


def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(ConfigError, match="cannot be written"):
        start_run_folder(Path("/proc/samestep/run"))


def test_summary_is_a_table_with_the_command_that_uses_the_model(tmp_path):
    facts = {
        "name": "demo",
        "steps": 660,
        "test accuracy": 0.88123456,
        "odd": "a|b\nc",
        "use it": 'samestep predict X "t"',
    }
    write_summary(tmp_path / "summary.md", facts)
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# demo\n")
    assert "| steps | 660 |" in text
    assert "| test accuracy | 0.8812 |" in text
    assert "| odd | a\\|b c |" in text
    assert '```bash\nsamestep predict X "t"\n```' in text


def test_recording_costs_little(folder):
    log = RunLog(folder, is_main=True, total_steps=1000)
    log.record(VALUES, 0)  # opens TensorBoard
    started = time.perf_counter()
    for step in range(1, 201):
        log.record(VALUES, step)
    elapsed_s = time.perf_counter() - started
    log.close()
    assert elapsed_s / 200 < 0.01


def test_a_run_directory_is_used_by_one_process_at_a_time(tmp_path):
    held = lock_run_folder(tmp_path / "run")
    code = (
        "from pathlib import Path; from trainer.log import lock_run_folder\n"
        f"lock_run_folder(Path({str(tmp_path / 'run')!r}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is in use: another process trains there" in other.stderr
    held.release()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_system_without_locks_keeps_nobody_out_after_a_kill(tmp_path):
    """Lustre as it is often mounted. filelock's own way out is a file, which a killed process leaves behind."""
    code = (
        "import errno, fcntl, os; from pathlib import Path; from trainer.log import lock_run_folder\n"
        "def flock(*_): raise OSError(errno.ENOSYS, 'Function not implemented')\n"
        "fcntl.flock = flock\n"
        f"assert lock_run_folder(Path({str(tmp_path / 'run')!r})) is None\n"
        "os.kill(os.getpid(), 9)"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
