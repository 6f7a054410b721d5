"""Tests reach no other machine, and what they must reach on this one they do: the guard in conftest.py is real.

It holds in the process of the tests. Processes that they start, such as the ranks of one run, are not under it.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

ELSEWHERE = ("192.0.2.1", 80)  # set aside for documentation (RFC 5737): no machine has it


@pytest.mark.parametrize("call", ["connect", "connect_ex"])
def test_other_machines_are_out_of_reach(call: str) -> None:
    with socket.socket() as asked, pytest.raises(PermissionError, match="must not use the network"):
        getattr(asked, call)(ELSEWHERE)


def test_nor_without_a_connection() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as asked:
        with pytest.raises(PermissionError, match="must not use the network"):
            asked.sendto(b"x", ELSEWHERE)
        with pytest.raises(PermissionError, match="must not use the network"):
            asked.sendmsg([b"x"], [], 0, ELSEWHERE)


def test_nor_through_the_libraries_above() -> None:
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.URLError, match="must not use the network"):
        straight.open(f"http://{ELSEWHERE[0]}/", timeout=5)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_the_loopback_is_within_reach(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as asked:
        asked.connect((name, server.getsockname()[1]))
        answered, _ = server.accept()
        with answered:
            asked.sendall(b"here")
            assert answered.recv(4) == b"here"


RANK = """
import datetime, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2,
                        timeout=datetime.timedelta(seconds=60))
value = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(value)
print(value.item())
dist.destroy_process_group()
"""


def test_two_ranks_find_each_other() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, place, rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert [out.decode().split() for out, _ in told] == [["3.0"], ["3.0"]], told
