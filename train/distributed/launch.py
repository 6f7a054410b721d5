"""How processes that ``torchrun`` started become ranks: they join, agree that they do the same, and end together."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from nest_fn.train.errors import DistributedError
from nest_fn.train.signals import stopping

from .collectives import ALONE, Ranks
from .heartbeat import Heartbeat

_COLLECTIVE = re.compile(r"gloo|NCCL|c10d|TCPStore|[Cc]onnection (closed|reset|refused)|Broken pipe|[Tt]imed out")


@dataclass(frozen=True)
class Job:
    """The ranks, and the store through which they can be asked what they are."""

    ranks: Ranks = ALONE
    local_rank: int = 0  # among the processes of this machine: the index of its GPU
    store: Store | None = None
    heartbeat: Heartbeat | None = None

    def diagnose(self, error: BaseException) -> BaseException:
        """The error to end with: where a call to other ranks failed, one that says which was lost, and of what."""
        if self.heartbeat is None or not isinstance(error, RuntimeError):
            return error
        if isinstance(error, RankFailed) or _COLLECTIVE.search(str(error)):
            return self.heartbeat.diagnose(_first_line(error))
        return error

    def hold(self) -> None:
        """This rank ends, but has something to save first that may take long: its heartbeat must not end it before."""
        if self.heartbeat is not None:
            self.heartbeat.stop()

    def agree(self, facts: Mapping[str, object]) -> None:
        """Raise ``DistributedError`` on every rank unless all give the same facts; it names the ranks that differ."""
        ranks, store = self.ranks, self.store
        if store is None:
            return
        mine = {name: json.dumps(value) for name, value in facts.items()}
        if ranks.is_main:
            store.set("facts", json.dumps(mine))
        theirs = json.loads(store.get("facts"))
        differ = [
            f"{name} is {_short(mine.get(name))}, on rank 0 {_short(theirs.get(name))}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]
        store.set(f"differs/{ranks.rank}", "; ".join(differ[:5]))
        verdicts = [verdict.decode() for verdict in store.multi_get([f"differs/{r}" for r in range(ranks.world)])]
        odd = [f"rank {rank}: {verdict}" for rank, verdict in enumerate(verdicts) if verdict]
        if odd:
            shown = "\n  ".join(odd[:20])
            raise DistributedError(f"{len(odd)} of {ranks.world} ranks differ from rank 0; start all alike\n  {shown}")


class RankFailed(RuntimeError):
    """Another rank told that it ends with an error; ``Job.diagnose`` finds out which."""


SINGLE = Job()


@contextmanager
def init_ranks(
    rank_timeout_s: float, collective_timeout_s: float, on_hang: Callable[[DistributedError], None]
) -> Iterator[Job]:
    """Be one of the ranks while the block runs; alone where no launcher has set ``WORLD_SIZE`` above 1.

    An error that comes of a lost rank is raised as ``DistributedError`` with its number; where the main thread hangs in
    a call to it, ``on_hang`` is called from another thread and must end the process.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield SINGLE
        return
    timeout = timedelta(seconds=collective_timeout_s)
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
        heartbeat = Heartbeat(PrefixStore("heartbeat", store), rank, world, rank_timeout_s, on_hang)
        dist.init_process_group(
            _backend(), store=PrefixStore("group", store), rank=rank, world_size=world, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"cannot join {world} ranks: {_first_line(error)}; start with torchrun.") from error
    job = Job(Ranks(rank, world), int(os.environ.get("LOCAL_RANK", "0")), PrefixStore("job", store), heartbeat)
    job.ranks.any(False)  # every heartbeat has been made
    heartbeat.start()
    # Where a rank is lost, torchrun terminates the others: they shall live until they have said which it was. What
    # asked all to stop may come a second time, from torchrun, while they end.
    with _ignore_signals(*(number for number in stopping() if number != signal.SIGINT)):
        yield from _watched(job, heartbeat)
    dist.destroy_process_group()


def _watched(job: Job, heartbeat: Heartbeat) -> Iterator[Job]:
    """Tell the others of an error, or be told by them."""
    try:
        yield job
    except RuntimeError as error:
        diagnosed = job.diagnose(error)
        if diagnosed is not error:
            raise diagnosed from error
        heartbeat.report_failure(_first_line(error))
        raise
    except DistributedError:  # which the others found out for themselves
        raise
    except BaseException as error:
        heartbeat.report_failure(_first_line(error))
        raise
    finally:
        # A thread that is inside of the store when the interpreter goes would abort the process.
        heartbeat.stop()


@contextmanager
def _ignore_signals(*numbers: int) -> Iterator[None]:
    """Signals do nothing while the block runs, unless a handler of their own is set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _backend() -> str:
    """gloo for what lies on the CPU, NCCL for what lies on a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _short(value: str | None) -> str:
    return "absent" if value is None else value if len(value) <= 80 else value[:77] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:300]
