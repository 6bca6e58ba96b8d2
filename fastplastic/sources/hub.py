"""Where the pretrained weights of a timm model are, decided within seconds and without noise.

timm and the hub's client retry for most of a minute when the hub is out of reach. Here a file in
the cache is taken without asking; else one request, by the client that would download, decides.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from urllib.request import Request, urlopen

import torch

from fastplastic.errors import FileError, InputError

# The question whether the hub answers may take this long: together with the rest less than 5 s.
HUB_SECONDS = 4.0
HUB_PREFIXES = ("hf-hub", "hf_hub")
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pth")


@dataclass(frozen=True)
class Source:
    """How timm can be asked for a model.

    Attributes:
        name: The name to give to `timm.create_model`.
        overlay: Changes to the pretrained configuration: a cached file in place of the hub.
        lack: Why there are no pretrained weights, or None when there should be.
        offered: Whether somebody offers pretrained weights for this model at all.
    """

    name: str
    overlay: dict[str, Any] | None = None
    lack: str | None = None
    offered: bool = True


def find_weights(name: str) -> Source:
    """Find the pretrained weights of a model: in the cache, or on a hub that answers.

    Args:
        name: A timm model name, with or without tag, or "hf-hub:OWNER/NAME[@REVISION]".

    Raises:
        InputError: The name of a hub repository is malformed.
        FileError: Even the description of a hub model cannot be had.
    """
    prefix, colon, identifier = name.partition(":")
    if colon and prefix in HUB_PREFIXES:
        return _find_repository(name, identifier)
    if colon:
        return Source(name)
    from timm.models import get_pretrained_cfg

    cfg: Any = get_pretrained_cfg(name)
    if cfg is None:  # a former name: timm itself knows which weights it stands for
        from huggingface_hub.constants import ENDPOINT

        return Source(name, lack=answers_not(ENDPOINT))
    if not (cfg.has_weights or cfg.state_dict):
        return Source(name, lack="timm offers none for this model", offered=False)
    if cfg.file or cfg.state_dict:
        return Source(name)
    if cfg.hf_hub_id:
        return _find_on_hub(name, cfg)
    address = str(cfg.url if isinstance(cfg.url, str) else cfg.url[0])
    file = address.rpartition("/")[2] if isinstance(cfg.url, str) else cfg.url[1]
    kept = Path(torch.hub.get_dir(), "checkpoints", file)
    return Source(name, lack=None if kept.is_file() else answers_not(address))


def _find_on_hub(name: str, cfg: Any) -> Source:
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = cfg.hf_hub_id.partition("@")
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors"]
    # What timm asks for next where there are no safetensors.
    files += [] if cfg.hf_hub_filename else ["pytorch_model.bin"]
    for file in files:
        kept = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(kept, str):
            return Source(name, {"file": kept, "custom_load": False})
    return Source(name, lack=_unanswered(lambda: _ask_hub(repository, files[0], revision)))


def _find_repository(name: str, identifier: str) -> Source:
    """Find a model that is described by a repository of the hub and nowhere else."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = identifier.partition("@")
    try:
        kept = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except HFValidationError as error:
        raise InputError(f"{name}: no name of a repository: expected hf-hub:OWNER/NAME") from error
    local = Source(f"local-dir:{Path(kept).parent}") if isinstance(kept, str) else None
    if local and isinstance(kept, str):
        if any(next(Path(kept).parent.glob(pattern), None) for pattern in _WEIGHT_FILES):
            return local
    lack = _unanswered(lambda: _ask_hub(repository, "config.json", revision))
    if lack and not local:
        raise FileError(
            f"{name}: cannot be read from the hub ({lack}) and is not in the cache: "
            "check the name and the connection"
        )
    return Source(local.name if local and lack else name, lack=lack)


def _ask_hub(repository: str, file: str, revision: str) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT")
    address = hf_hub_url(repository, file, revision=revision or None, endpoint=endpoint)
    try:
        get_hf_file_metadata(address, timeout=HUB_SECONDS)
    except EntryNotFoundError:
        return  # the hub answers; timm looks for other file names


def _ask(address: str) -> None:
    with urlopen(Request(address, method="HEAD"), timeout=HUB_SECONDS):
        pass


def answers_not(address: str) -> str | None:
    """Return why a server does not answer for an address in time, or None when it does."""
    return _unanswered(lambda: _ask(address))


def _unanswered(ask: Callable[[], None]) -> str | None:
    """Return why a question gets no answer in time, or None when it does.

    It is asked in a thread, because looking up a host name can hang and takes no time limit.
    """
    outcome: SimpleQueue[str | None] = SimpleQueue()

    def run() -> None:
        try:
            ask()
        except Exception as error:  # whatever the hub's client raises, it cannot be used
            outcome.put(reason(error))
        else:
            outcome.put(None)

    Thread(target=run, name="fastplastic-hub", daemon=True).start()
    try:
        return outcome.get(timeout=HUB_SECONDS)
    except Empty:
        return f"no answer within {HUB_SECONDS:g} s"


def reason(error: BaseException) -> str:
    """Return an error as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160].rstrip(": ")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the log and the warnings of timm and the hub's client off stderr."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    hide_bars = not sys.stderr.isatty() and not are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        if hide_bars:
            disable_progress_bars()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hide_bars:
            enable_progress_bars()


@contextmanager
def tensors_only() -> Iterator[None]:
    """Make every `torch.load` refuse code: some versions of timm ask it not to."""
    force, allow = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, allow)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})
