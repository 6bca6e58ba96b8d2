"""Pretrained weights: from the cache, from a hub that answers, or a warning within seconds."""

import http.server
import logging
import os
import random
import shutil
import socket
import threading
import warnings
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fastplastic.errors import FileError, InputError
from fastplastic.sources import create_model, hub

TINY = "test_resnet"
REPOSITORY = "models--timm--test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """Point the hub at a port where nobody listens, and its cache at an empty folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def cached(tmp_path: Path, file: str) -> Path:
    """Make a folder of the hub's cache, and return the path of a file in it, yet to be written."""
    folder = tmp_path / "hub" / REPOSITORY
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    return folder / "snapshots" / "abc" / file


def rng_state() -> tuple:
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]


def test_bad_arguments_are_blamed_before_the_hub():
    for pretrained in (None, True):
        with pytest.raises(InputError, match="fo=1"):
            create_model(TINY, pretrained=pretrained, model_kwargs={"fo": 1})


# The hub


def test_hub_out_of_reach_falls_back_with_a_warning(capfd):
    loaded = create_model(TINY)
    assert loaded.weights == "random"
    assert loaded.warning.startswith(
        "RANDOM WEIGHTS: the pretrained weights of test_resnet cannot be had (ConnectError: "
    )
    assert loaded.warning.endswith(
        "Every number below is of an untrained network. Check the connection, or pass "
        "--checkpoint FILE"
    )
    assert "\n" not in loaded.warning
    random_ = create_model(TINY, pretrained=False).model
    assert torch.equal(weights(loaded.model), weights(random_))
    assert capfd.readouterr() == ("", "")


def test_hub_out_of_reach_is_refused_on_request():
    with pytest.raises(FileError) as error:
        create_model(TINY, pretrained=True)
    assert str(error.value).startswith(
        "test_resnet: the pretrained weights cannot be had (ConnectError: "
    )
    assert str(error.value).endswith(": check the connection, or pass a checkpoint file")


def test_weights_that_nobody_offers():
    loaded = create_model("lcnet_035")
    assert loaded.warning == (
        "RANDOM WEIGHTS: the pretrained weights of lcnet_035 cannot be had (timm offers none for "
        "this model). Every number below is of an untrained network. Pass --checkpoint FILE"
    )
    with pytest.raises(InputError) as error:
        create_model("lcnet_035", pretrained=True)
    assert str(error.value) == (
        "lcnet_035: no pretrained weights (timm offers none for this model): pass a checkpoint, or "
        "choose a model that has some"
    )


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "OfflineModeIsEnabled" in create_model(TINY).warning


def test_a_hub_that_never_answers(monkeypatch):
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        warning = create_model(TINY).warning
    assert "(ReadTimeout" in warning or "(no answer within 0.3 s)" in warning


def test_a_host_name_that_is_never_looked_up(monkeypatch):
    end = threading.Event()

    def hang(*_, **__):
        end.wait()
        raise OSError("too late")

    monkeypatch.setattr(hub, "HUB_SECONDS", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    try:
        assert "(no answer within 0.3 s)" in create_model(TINY).warning
    finally:
        end.set()
        asking = [thread for thread in threading.enumerate() if thread.name == "fastplastic-hub"]
        for thread in asking:
            thread.join()


def test_the_time_for_the_question_leaves_room_for_the_rest():
    assert hub.HUB_SECONDS <= 4


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that knows no file, or refuses."""

    status = 404
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.asked.append(self.path)
        self.send_response(self.status)
        if self.status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def answering(monkeypatch):
    """Run a hub on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_answers_is_asked_by_timm(answering, monkeypatch):
    state = create_model(TINY, pretrained=False, seed=5).model.state_dict()
    monkeypatch.setattr(
        timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: dict(state)
    )
    loaded = create_model(TINY)
    assert answering.asked == ["/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"]
    assert (loaded.weights, loaded.warning) == ("pretrained", None)
    assert all(torch.equal(loaded.model.state_dict()[name], state[name]) for name in state)


def test_a_download_that_breaks(answering, monkeypatch, caplog):
    def broken(*_, **__):
        warnings.warn("noise", stacklevel=1)
        logging.getLogger("timm.models").warning("noise")
        raise ConnectionResetError("in the middle")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", broken)
    assert "(ConnectionResetError: in the middle)" in create_model(TINY).warning
    with pytest.raises(FileError, match="in the middle"):
        create_model(TINY, pretrained=True)
    assert not caplog.records


def test_a_hub_that_refuses(answering, monkeypatch):
    monkeypatch.setattr(answering, "status", 403)
    assert "403" in create_model(TINY).warning


def test_weights_that_stand_elsewhere(tmp_path, monkeypatch):
    name = "gcvit_xxtiny"
    monkeypatch.setattr(hub, "_ask", lambda _: (_ for _ in ()).throw(OSError("no route")))
    assert hub.find_weights(name).lack == "OSError: no route"
    file = timm.models.get_pretrained_cfg(name).url.rpartition("/")[2]
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "torch" / "hub" / "checkpoints" / file).touch()
    assert hub.find_weights(name).lack is None


# The cache


def test_cached_weights_need_no_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **_: asked.append(host))
    model = create_model(TINY, pretrained=False, seed=5).model
    save_file(model.state_dict(), cached(tmp_path, "model.safetensors"))
    loaded = create_model(TINY)
    assert (loaded.weights, loaded.warning) == ("pretrained", None)
    assert torch.equal(weights(loaded.model), weights(model))
    other_head = create_model(TINY, num_classes=3).model
    assert other_head.fc.out_features == 3
    assert not asked
    assert torch.equal(other_head.conv1[0].weight, model.conv1[0].weight)


def test_pretrained_weights_do_not_touch_the_rng(tmp_path):
    model = create_model(TINY, pretrained=False).model
    save_file(model.state_dict(), cached(tmp_path, "model.safetensors"))
    before = rng_state()
    create_model(TINY)
    assert rng_state() == before


class Runs:
    """A pickle that makes a file when it is loaded the careless way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_cached_weights_is_not_run(tmp_path, monkeypatch):
    torch.save({"fc.weight": Runs(tmp_path / "victim")}, cached(tmp_path, "pytorch_model.bin"))
    # As versions of timm did that do not ask for weights only.
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: load(*a, **k | {"weights_only": False}))
    assert create_model(TINY).weights == "random"
    assert not (tmp_path / "victim").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_hub_models_in_the_cache(tmp_path):
    name = "hf-hub:timm/test_resnet.r160_in1k"
    with pytest.raises(FileError) as error:
        create_model(name, pretrained=False)
    assert str(error.value).startswith(f"{name}: cannot be read from the hub (ConnectError")
    config = cached(tmp_path, "config.json")
    config.write_text('{"architecture": "test_resnet", "num_classes": 4}')
    assert "ConnectError" in create_model(name).warning
    model = create_model(name, pretrained=False).model
    save_file(model.state_dict(), config.with_name("model.safetensors"))
    loaded = create_model(name, seed=9)
    assert (loaded.weights, loaded.name) == ("pretrained", name)
    assert torch.equal(weights(loaded.model), weights(model))
    shutil.copytree(config.parent, tmp_path / "copy")
    local = create_model(f"local-dir:{tmp_path / 'copy'}", pretrained=True)
    assert torch.equal(weights(local.model), weights(model))


def test_a_folder_that_is_not_there():
    with pytest.raises(FileError, match=r"^local-dir:/none: cannot be read \(FileNotFoundError"):
        create_model("local-dir:/none")


def test_quiet_restores_the_loggers():
    logger = logging.getLogger("timm")
    logger.setLevel(logging.INFO)
    try:
        with hub.quiet():
            assert not logger.isEnabledFor(logging.CRITICAL)
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(logging.NOTSET)
