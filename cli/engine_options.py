"""The options of `trial` that say where its runs are made, and how many at once."""

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Literal

from fastplastic.cli.parsing import option
from fastplastic.errors import InputError

if TYPE_CHECKING:
    from fastplastic.trials import RunNeeds

_RUNS = "Runs"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where the runs of a trial are made."""

    engine: Annotated[
        Literal["local", "ray"],
        option(
            "--engine",
            panel=_RUNS,
            help="local: one run after the other. ray: several at once, here or on a cluster.",
        ),
    ] = "local"
    address: Annotated[
        str | None,
        option(
            "--address",
            panel=_RUNS,
            metavar="ADDRESS",
            help="Cluster of Ray, as auto or HOST:6379. (default: RAY_ADDRESS, or this machine)",
        ),
    ] = None
    cpus_per_run: Annotated[
        float | None,
        option(
            "--cpus-per-run",
            panel=_RUNS,
            help="CPUs of a run on Ray, or a part. (default: its threads; beside a GPU 1)",
        ),
    ] = None
    gpus_per_run: Annotated[
        float | None,
        option(
            "--gpus-per-run",
            panel=_RUNS,
            help="GPUs of a run on Ray, or a part. (default: 1 where --device is one)",
        ),
    ] = None

    def check_engine(self, device: str | None) -> None:
        """Refuse what no engine takes: InputError.

        Args:
            device: As it was named.
        """
        amounts = {"--cpus-per-run": self.cpus_per_run, "--gpus-per-run": self.gpus_per_run}
        if self.engine != "ray":
            for flag, value in {"--address": self.address, **amounts}.items():
                if value is not None:
                    raise InputError(f"{flag} {value}: is for runs on Ray: add --engine ray")
        for flag, amount in amounts.items():
            if amount is not None:
                _check_amount(flag, amount)
        self._check_device(device)

    def _check_device(self, device: str | None) -> None:
        """Refuse a device that Ray does not give: InputError."""
        if self.engine != "ray" or device is None:
            return
        kind, _, index = device.partition(":")
        if index and kind == "cuda":
            raise InputError(f"--device {device}: Ray chooses the GPU of a run: --device cuda")
        if kind == "cuda" and self.gpus_per_run == 0:
            raise InputError("--gpus-per-run 0 beside --device cuda: expected more than 0")
        if kind != "cuda" and self.gpus_per_run:
            raise InputError(
                f"--gpus-per-run {self.gpus_per_run:g} beside --device {device}: expected none"
            )


def _check_amount(flag: str, amount: float) -> None:
    """Refuse what Ray cannot give of CPUs or GPUs: InputError."""
    least = "0, or more" if flag.startswith("--gpus") else "more than 0"
    if not isfinite(amount) or amount < 0 or (amount == 0 and least == "more than 0"):
        raise InputError(f"{flag} {amount:g}: expected {least}")
    if amount > 1 and amount != round(amount) and flag.startswith("--gpus"):
        raise InputError(f"{flag} {amount:g}: expected whole ones, or a part of one as 0.5")
    if abs(amount - round(amount, 4)) > 1e-9:
        raise InputError(f"{flag} {amount:g}: expected four decimal places at most, as Ray counts")


def on_ray(options: EngineOptions, device: str | None) -> "tuple[str, RunNeeds]":
    """Return on which device the runs are trained on Ray, and what a run takes of a machine.

    Args:
        options: What was asked for.
        device: As it was named.
    """
    import torch

    from fastplastic.trials import RunNeeds

    gpus = options.gpus_per_run
    if device is None:
        # The program may be started where there is none, for machines that have some.
        device = "cuda" if gpus or (gpus is None and torch.cuda.is_available()) else "cpu"
    if gpus is None:
        gpus = 1.0 if device == "cuda" else 0.0
    threads = torch.get_num_threads()
    cpus = options.cpus_per_run or (1.0 if gpus else float(threads))
    return device, RunNeeds(cpus=cpus, gpus=gpus, threads=threads)
