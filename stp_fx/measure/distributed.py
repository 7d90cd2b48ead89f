"""Processes of a ``torch.distributed`` job that measure together.

A process that fails stays alive as a rule, and the others would wait for it until the job's time limit. So it announces its
failure in the job's key-value store, and who waits for a collective looks there: :func:`together`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import time
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stp_fx.errors import PassError

__all__ = ["agreed", "gathered", "group_device", "meet", "rank_zeros", "several_processes", "summed", "together"]

T = TypeVar("T")

_LOOK = 0.2
"""Seconds between two looks for failures, while waiting."""
_LONGEST = 300
"""Letters of an exception that the other ranks are told."""


@dataclasses.dataclass
class _Job:
    """This process's part in a job, by its default group: how often it has begun something together, which of these it is in, and
    why its collectives no longer meet those of the others."""

    group: Any = None
    begun: int = 0
    inside: bool = False
    broken: str | None = None


_JOB = _Job()


def several_processes() -> bool:
    """Whether there is a default process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def together(what: str) -> Generator[None]:
    """Around what all processes do alike: if one fails, the others raise too, in well under a second, and it ends on all or on
    none.

    Raises:
        PassError: another process has failed; names its rank and says with what. Also at the next time, where collectives had
            begun by then, so that they no longer meet.
    """
    if not several_processes() or _job().inside:
        yield
        return
    job = _job()
    job.begun += 1
    job.inside = True
    try:
        if job.broken is not None:
            raise PassError(f"{what}: {job.broken}")
        yield
        gathered(None)
    except BaseException as error:
        if job.broken is None or not isinstance(error, PassError):
            text = f"{type(error).__name__}: {error}"[:_LONGEST]
            _store().set(_key(job), f"rank {dist.get_rank()} failed with {text}")
        raise
    finally:
        job.inside = False


def agreed(value: T) -> T:
    """The value of rank 0, on every rank: for measurements that differ from process to process, such as times."""
    return gathered(value)[0] if several_processes() else value


def gathered(value: T) -> list[T]:
    """The values of all ranks, on every rank."""
    if not several_processes():
        return [value]
    device = group_device()
    written = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    lengths = _all(torch.tensor([len(written)], device=device))
    longest = max(int(each) for each in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(written)] = written
    return [pickle.loads(bytes(each[: int(n)].tolist())) for each, n in zip(_all(padded), lengths, strict=True)]


def meet() -> None:
    """Waits for all processes, as long as none has failed: before a collective of torch's own, which knows of no failures."""
    if several_processes():
        _wait(dist.all_reduce(torch.zeros(1, device=group_device()), async_op=True))


def summed(count: int, tensors: Sequence[torch.Tensor]) -> int:
    """Sums ``tensors`` in place, and the number, over all processes; each has the same shapes everywhere."""
    device = tensors[0].device if tensors else torch.device("cpu")
    total = torch.tensor([float(count)], dtype=torch.float64, device=device)
    for each in (total, *tensors):
        _wait(dist.all_reduce(each, async_op=True))
    return int(total.item())


def rank_zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor on every rank, whatever the shape of the others': written into ``tensor`` where it fits."""
    if not several_processes():
        return tensor
    shape = agreed(tensor.shape)
    result = tensor if tensor.shape == shape and tensor.is_contiguous() else None
    if result is None:
        result = tensor.contiguous() if tensor.shape == shape else torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    _wait(dist.broadcast(result, src=0, async_op=True))
    return result if result is tensor or tensor.shape != shape else tensor.copy_(result)


def _all(tensor: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    _wait(dist.all_gather(found, tensor, async_op=True))
    return found


def _wait(work: Any) -> None:
    """Until a collective has ended, or another process has announced that it will not come."""
    job, since, pause = _job(), time.monotonic(), 1e-5
    while job.inside and work is not None and not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
        if time.monotonic() - since > _LOOK:
            since = time.monotonic()
            if _store().check([_key(job)]):
                said = _store().get(_key(job)).decode()
                job.broken = f"{said}; collectives have begun without it, so end all processes of the job"
                raise PassError(job.broken)
    if work is not None:
        work.wait()


def _job() -> _Job:
    group = dist.group.WORLD
    if _JOB.group is not group:
        _JOB.__dict__.update(dataclasses.asdict(_Job()), group=group)
    return _JOB


def _key(job: _Job) -> str:
    return f"stp_fx/failed/{job.begun}"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def group_device() -> torch.device:
    """Where collectives of the default group find their tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
