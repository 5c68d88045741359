"""The pool of ranks does not fail tests by itself: no rank leaves before the others are done, no port is taken by someone else."""

import os
import socket
import time
from pathlib import Path

from tests.rank_pool import free_ports, is_free, run_ranks


def is_there_half_a_second_later(folder: Path) -> bool:
    """Rank 0 is done at once; rank 1 looks for its process after half a second."""
    if os.environ["RANK"] == "0":
        (folder / "pid").write_text(str(os.getpid()))
        return True
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        time.sleep(0.01)
    time.sleep(0.5)
    process = Path("/proc", (folder / "pid").read_text(), "stat")
    return process.exists() and process.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_rank_stays_until_all_have_returned(tmp_path: Path) -> None:
    assert run_ranks(is_there_half_a_second_later, "ddp", 2, args=(tmp_path,)) == [True, True]


def test_a_port_is_free_and_none_that_the_system_gives_to_others() -> None:
    ports = free_ports(50)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        given = int(other.getsockname()[1])
        assert not is_free(given)
        assert len(set(ports)) == 50
        assert max(ports) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]) <= given
