"""The engine that makes runs on Ray: several at once, on this machine or on those of a cluster.

Each run is a task of Ray, which places it where its CPUs and GPUs are free. What it needs is made
there from a description: models and images do not travel. Only this process writes results.
"""

import json
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any
from uuid import uuid4

import torch

from fastplastic.errors import InputError, ProcessError
from fastplastic.trials.engine import Listener, Made, Pending, Trainer
from fastplastic.trials.failures import Failure, attempt
from fastplastic.trials.settings import differences

# How often a run is begun whose worker dies: killed, out of memory, its machine gone.
TRIES = 3
# Nothing large travels. The least that Ray takes is three quarters of it.
_STORE_BYTES = 100 * 2**20
# Python hears Ctrl-C between one wait and the next.
_WAIT_SECONDS = 0.2
# How long the machine of an address may take to answer.
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class RunNeeds:
    """What a run takes of a machine.

    Attributes:
        cpus: CPUs, as Ray counts them.
        gpus: GPUs; a part of one, or whole ones.
        threads: Threads of torch. As results depend on them in their last bits, they are those of
            this process, and so the same as in runs that are made here.
    """

    cpus: float
    gpus: float = 0.0
    threads: int = field(default_factory=torch.get_num_threads)

    def __str__(self) -> str:
        gpus = f"{_many(self.gpus, 'GPU')}, " * (self.gpus > 0)
        return f"{_many(self.cpus, 'CPU')}, {gpus}{_many(self.threads, 'thread')}"


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a trial.

    Attributes:
        work: Makes the trainer, there; travels as the name of a function and its arguments.
        facts: What settles the results here.
        needs: What a run takes.
        folder: Where this process is: paths begin there.
        where: Whether errors name the machine.
        key: Tells trials apart.
    """

    work: Callable[[], Trainer]
    facts: Mapping[str, Any]
    needs: RunNeeds
    folder: str = field(default_factory=os.getcwd)
    where: bool = False
    key: str = field(default_factory=lambda: uuid4().hex)


class OnRay:
    """The engine that makes runs on Ray.

    Args:
        work: Makes the trainer in a worker; can be pickled.
        facts: What settles the results: settings and facts of the task.
        needs: What a run takes of a machine.
        address: Of a cluster, as for `ray.init`; None starts Ray on this machine, or takes
            RAY_ADDRESS where that is set.
        warn: Told in a line what goes wrong and is mended.

    Raises:
        InputError: Ray is not installed.
    """

    def __init__(
        self,
        work: Callable[[], Trainer],
        facts: Mapping[str, Any],
        needs: RunNeeds,
        *,
        address: str | None = None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._ray = require_ray()
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._warn = warn
        self._job = Job(work, _told(facts), needs, where=self._address != "local")

    @property
    def place(self) -> str:
        """Return where runs are made, in words."""
        return "on this machine" if self._address == "local" else f"at {self._address}"

    def run(self, pending: Sequence[Pending], listener: Listener) -> None:
        """Make runs, as any `Engine` does.

        Raises:
            InputError: The cluster cannot be reached, or no machine is large enough.
            ProcessError: A run failed in a way that is not ours, or its workers died.
        """
        ray, needs = self._ray, self._job.needs
        with _connected(ray, self._address):
            self._check_room(len(pending))
            # Begun again below, with a word: Ray does it in silence, and for memory without end.
            task = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=0)(_make)
            job = ray.put(self._job)
            going = {task.remote(job, item): (item, 1) for item in pending}
            listener.share(pending[0], 0.0)
            try:
                while going:
                    finished, _ = ray.wait(list(going), timeout=_WAIT_SECONDS)
                    if not finished:
                        continue
                    (first,) = finished
                    item, tries = going.pop(first)
                    made = self._made(first, item, tries)
                    if made is None:
                        going[task.remote(job, item)] = (item, tries + 1)
                    else:
                        listener.finished(made)
            finally:
                for reference in going:
                    ray.cancel(reference)

    def _made(self, reference: Any, item: Pending, tries: int) -> Made | None:
        """Return a finished run, or raise what it raised; None where it is to be tried again."""
        try:
            found = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # Before any code of ours: in the worker something is not installed, or another version.
            last = str(error).strip().splitlines()[-1]
            raise (
                Failure("", f"{last}; expected what is installed here").within(item).error()
            ) from None
        except self._ray.exceptions.RayError as error:
            run = f"the run of {item.arm.name}, seed {item.seed}"
            reason = str(error).partition("\n")[0].partition(". ")[0]
            if tries == TRIES:
                raise ProcessError(
                    f"{run}: its worker died {TRIES} times ({type(error).__name__}: {reason}): "
                    "finished runs are kept; give each more room, as by a larger --cpus-per-run"
                ) from None
            self._warn(
                f"{run}: its worker died ({reason}); it begins again, {tries + 1} of {TRIES}"
            )
            return None
        if isinstance(found, Failure):
            raise found.error()
        assert isinstance(found, Made)
        return found

    def _check_room(self, runs: int) -> None:
        """Refuse runs that no machine has room for, as they would wait for ever: InputError."""
        needs = self._job.needs
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        rooms = [_room(node, needs) for node in nodes]
        if not any(rooms):
            largest = [_many(max(n.get(kind, 0) for n in nodes), kind) for kind in ("CPU", "GPU")]
            text = (
                f"no machine has room for a run ({needs}): the largest has {' and '.join(largest)}"
            )
            if self._address == "local":
                raise InputError(f"{text}: take less by --cpus-per-run and --gpus-per-run")
            self._warn(f"{text}; runs wait until one joins the cluster")
        elif sum(rooms) == 1 < min(runs, needs.threads):
            self._warn(
                f"there is room for one run at a time ({needs}): with OMP_NUM_THREADS=1 before the "
                "command there is for more"
            )


def require_ray() -> Any:
    """Return Ray; InputError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise InputError(
            '--engine ray needs Ray: pip install "fastplastic[ray]", or leave it out'
        ) from None
    return ray


def _make(job: Job, item: Pending) -> Made | Failure:
    """Make a run: what is done in a worker."""
    where = f"on {platform.node()}" * job.where
    try:
        trainer = _trainer(job)
    except Exception as error:
        return Failure.of(error).within(item, where)
    return attempt(trainer, item, where)


# A worker makes one run after the other, all of one trial: model and images are loaded once.
_trainers: dict[str, Trainer] = {}


def _trainer(job: Job) -> Trainer:
    """Return what makes the runs of a trial in this worker."""
    if os.path.isdir(job.folder):
        os.chdir(job.folder)
    torch.set_num_threads(job.needs.threads)
    if job.key not in _trainers:
        _trainers.clear()
        trainer = job.work()
        own = _told({**trainer.settings.to_dict(), **trainer.task.facts})
        found = list(differences(own, job.facts))
        if found:
            raise InputError(
                f"a worker has another trial than the program that began it ({found[0]}), expected "
                "the same files and versions on all machines"
            )
        _trainers[job.key] = trainer
    return _trainers[job.key]


def _told(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has to be the same in all workers, as it comes back from JSON."""
    from fastplastic import __version__

    versions = {"fastplastic": __version__, "torch": torch.__version__}
    return dict(json.loads(json.dumps({**facts, "version": versions})))


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Let Ray run inside the block, in silence; nothing of it goes to stdout."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(StringIO()))
        if not ray.is_initialized():
            _begin(ray, address)
            # After Ctrl-C there is no time for it: Ray ends when its program has.
            stack.push(lambda kind, *_: None if kind is KeyboardInterrupt else ray.shutdown())
        yield


def _begin(ray: Any, address: str) -> None:
    _check_reachable(address)
    local = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    own = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        # Workers would look for modules in this folder first, such as one with a clone of ours.
        with chdir(sys.prefix):
            ray.init(
                address, logging_level="error", log_to_driver=False,
                **(local if address == "local" else {}),
            )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    finally:
        if own:
            # Ray takes SIGTERM for itself.
            signal.signal(signal.SIGTERM, before)


def _check_reachable(address: str) -> None:
    """Refuse an address where nobody answers, for which Ray tries for minutes: InputError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()).partition(". ")[0][:160]
    return InputError(
        f"--address {address}: there is no cluster of Ray ({reason}): start one by ray start "
        "--head, or leave it out"
    )


def _room(node: Mapping[str, float], needs: RunNeeds) -> int:
    """Return how many runs a machine has room for at once."""
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus}
    rooms = [node.get(kind, 0.0) / much for kind, much in wanted.items() if much]
    # Of fractions of a millionth there are sums.
    return int(min(rooms) + 1e-6)


def _many(number: float, what: str) -> str:
    return f"{number:g} {what}{'s' * (number != 1)}"
