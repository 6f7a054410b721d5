"""Makes ranks of the processes that ``torchrun`` started: they join, check that they run the same job, end together."""

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
    """The ranks, and the store through which they exchange facts and heartbeats."""

    ranks: Ranks = ALONE
    local_rank: int = 0  # index among the processes of this machine, and of this process's GPU
    store: Store | None = None
    heartbeat: Heartbeat | None = None

    def diagnose(self, error: BaseException) -> BaseException:
        """The error to end with: if a call to other ranks failed, one that names the lost rank and the cause."""
        if self.heartbeat is None or not isinstance(error, RuntimeError):
            return error
        if isinstance(error, RankFailed) or _COLLECTIVE.search(str(error)):
            return self.heartbeat.diagnose(_first_line(error))
        return error

    def hold(self) -> None:
        """Stop the heartbeat of a rank that ends but saves first, so that it does not end the process meanwhile."""
        if self.heartbeat is not None:
            self.heartbeat.stop()

    def agree(self, facts: Mapping[str, object]) -> None:
        """Raise ``DistributedError`` on every rank unless all give the same facts; it names the ranks that differ."""
        ranks, store = self.ranks, self.store
        if store is None:
            return
        own = {name: json.dumps(value) for name, value in facts.items()}
        if ranks.is_main:
            store.set("facts", json.dumps(own))
        main = json.loads(store.get("facts"))
        differ = [
            f"{name} is {_short(own.get(name))}, on rank 0 {_short(main.get(name))}"
            for name in sorted(own.keys() | main.keys())
            if own.get(name) != main.get(name)
        ]
        store.set(f"differs/{ranks.rank}", "; ".join(differ[:5]))
        verdicts = [verdict.decode() for verdict in store.multi_get([f"differs/{r}" for r in range(ranks.world)])]
        differing = [f"rank {rank}: {verdict}" for rank, verdict in enumerate(verdicts) if verdict]
        if differing:
            head = f"{len(differing)} of {ranks.world} ranks differ from rank 0; start all alike"
            raise DistributedError("\n  ".join([head, *differing[:20]]))


class RankFailed(RuntimeError):
    """Another rank reported that it ends with an error; ``Job.diagnose`` determines which."""


SINGLE = Job()


@contextmanager
def init_ranks(
    rank_timeout_s: float, collective_timeout_s: float, on_hang: Callable[[DistributedError], None]
) -> Iterator[Job]:
    """Join the other ranks while the block runs; a single process unless a launcher has set ``WORLD_SIZE`` above 1.

    An error caused by a lost rank is raised as ``DistributedError`` that names the rank; if the main thread stays
    blocked in a call to it, ``on_hang`` is called from another thread and must end the process.
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
    job.ranks.any(False)  # a barrier: every rank has created its heartbeat
    heartbeat.start()
    # When a rank is lost, torchrun terminates the others; ignoring the signal gives them time to report which rank it
    # was. A signal that asked all ranks to stop may also arrive a second time, from torchrun, while they end.
    with _ignore_signals(*(number for number in stopping() if number != signal.SIGINT)):
        yield from _report_errors(job, heartbeat)
    dist.destroy_process_group()


def _report_errors(job: Job, heartbeat: Heartbeat) -> Iterator[Job]:
    """Report an error of this rank to the others, or raise one that names the rank which caused it."""
    try:
        yield job
    except RuntimeError as error:
        diagnosed = job.diagnose(error)
        if diagnosed is not error:
            raise diagnosed from error
        heartbeat.report_failure(_first_line(error))
        raise
    except DistributedError:  # the other ranks detect it themselves
        raise
    except BaseException as error:
        heartbeat.report_failure(_first_line(error))
        raise
    finally:
        # A thread inside a store call while the interpreter is finalised would abort the process.
        heartbeat.stop()


@contextmanager
def _ignore_signals(*numbers: int) -> Iterator[None]:
    """Ignore the signals while the block runs, unless the block sets handlers for them."""
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
    """gloo for CPU tensors, NCCL for GPU tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _short(value: str | None) -> str:
    return "absent" if value is None else value if len(value) <= 80 else value[:77] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:300]
