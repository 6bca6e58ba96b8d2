"""The callback for the Trainer of Lightning, on a tiny module of its own."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fastplastic.errors import InputError
from fastplastic.integrations.lightning import LightningPlasticity

pytestmark = [
    # Two cores need no workers to load tensors.
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    # Lightning gives the old name of what torch renamed.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
]
# A training that goes on saves where the one before it did.
GOES_ON = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
METHODS = {
    "redo": {"every": 4, "threshold": 0.6},
    "cbp": {"rate": 0.02, "maturity": 2},
    "swr": {"every": 4, "threshold": 0.05},
}


class Classifier(pl.LightningModule):
    """Two hidden layers with dropout."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 12), nn.ReLU(),
            nn.Linear(12, 3),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # What is dropped depends on the step alone, as Lightning keeps no random numbers.
        torch.manual_seed(self.global_step)
        images, labels = batch
        return cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Validated(Classifier):
    """Evaluates on other images than it is trained with."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(torch.full((64, 8), 5.0))


class InnerCaller(Classifier):
    """Calls the network inside, not itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.net(images), labels)


class Rows(Logger):
    """Keeps what it is given."""

    name = version = "rows"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def loader(batches: int = 12) -> DataLoader:
    draws = torch.Generator().manual_seed(1)
    images = torch.randn(8 * batches, 8, generator=draws)
    labels = (images[:, 0] > 0).long() + (images[:, 1] > 0).long()
    return DataLoader(list(zip(images, labels, strict=True)), batch_size=8)


def trainer_of(folder: Path, *callbacks: pl.Callback, **options) -> pl.Trainer:
    given = {
        "max_epochs": 1, "logger": False, "enable_progress_bar": False, "accelerator": "cpu",
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **given | options)


def state_of(trainer: pl.Trainer) -> list[Tensor]:
    """Return every parameter and every tensor of the optimizer's state."""
    weights = list(trainer.lightning_module.parameters())
    states = trainer.optimizers[0].state
    return [p.detach() for p in weights] + [v for p in weights for v in states[p].values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_profiles_change_nothing_and_reach_the_loggers(tmp_path: Path) -> None:
    plain = trainer_of(tmp_path)
    plain.fit(Classifier(), loader())
    callback = LightningPlasticity(freq=4, layers=True, start_step=4)
    # A logger that the Trainer itself gives something to in the last step only.
    logger = Rows()
    watched = trainer_of(tmp_path, callback, logger=logger, log_every_n_steps=12)
    watched.fit(Classifier(), loader())
    assert same(state_of(watched), state_of(plain))
    rows = [row for row in logger.rows if "plasticity/dormant" in row]
    assert [row["step"] for row in rows] == [8, 12]
    assert (
        rows[1]["plasticity/dormant/net.0"] == float(callback.profile["net.0"].dormant.sum()) / 16
    )
    shown = watched.callback_metrics["plasticity/dormant"]
    assert float(shown) == pytest.approx(rows[1]["plasticity/dormant"])
    assert not watched.optimizers[0]._optimizer_step_post_hooks


@GOES_ON
@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path, name: str) -> None:
    found = []
    for seed, path in ((0, None), (9, tmp_path / "epoch=1-step=6.ckpt")):
        callback = LightningPlasticity(name, freq=5, seed=3, **METHODS[name])
        saves = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
        trainer = trainer_of(tmp_path, callback, saves, enable_checkpointing=True, max_epochs=4)
        trainer.fit(Classifier(seed), loader(3), ckpt_path=path, weights_only=True)
        log = [reset.to_dict() for reset in callback.recycler.log]
        assert any(reset["step"] > 6 for reset in log) and any(r["step"] <= 6 for r in log)
        found.append((state_of(trainer), log, trainer.callback_metrics))
    (values, log, shown), (values_again, log_again, shown_again) = found
    assert same(values, values_again) and log == log_again
    assert shown == shown_again and "plasticity/reset" in shown


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    callback = LightningPlasticity("random", ratio=0.2, every=2, freq=3)
    logger = Rows()
    trainer = trainer_of(
        tmp_path, callback, accumulate_grad_batches=3, logger=logger, log_every_n_steps=4
    )
    trainer.fit(Validated(), loader(), loader(1))
    log = callback.recycler.log
    assert [reset.step for reset in log] == [2, 4]
    assert callback.profile.batches == 3 and callback.profile.samples == 24
    # The profile of step 3 tells of the reset in step 2, the end of that in step 4.
    rows = {row["step"]: row.get("plasticity/reset") for row in logger.rows}
    assert rows == {3: log[0].count, 4: log[1].count}


def test_in_bfloat16(tmp_path: Path) -> None:
    callback = LightningPlasticity("redo", every=2, threshold=0.6, freq=4)
    trainer_of(tmp_path, callback, precision="bf16-mixed").fit(Classifier(), loader(4))
    assert callback.recycler.log and callback.profile["net.0"].hidden.all()


def test_the_part_that_the_training_step_calls(tmp_path: Path) -> None:
    callback = LightningPlasticity(freq=2)
    with pytest.raises(InputError, match="the model was not called with gradients") as error:
        trainer_of(tmp_path, callback).fit(InnerCaller(), loader(2))
    assert "LightningPlasticity(part='model') measures" in error.value.__notes__[0]
    module = InnerCaller()
    callback = LightningPlasticity("random", ratio=0.2, every=2, freq=2, part="net")
    trainer_of(tmp_path, callback).fit(module, loader(2))
    assert callback.profile["0"].n_units == 16 and set(callback.recycler.log[0].counts) <= {
        "0",
        "3",
    }
    assert not module.net._forward_pre_hooks
    callback = LightningPlasticity(freq=2, part="encoder")
    with pytest.raises(InputError, match=r"part 'encoder' is no module of InnerCaller, .* as net"):
        trainer_of(tmp_path, callback).fit(InnerCaller(), loader(2))


def test_a_part_that_is_compiled(tmp_path: Path) -> None:
    module = InnerCaller()
    module.net = torch.compile(module.net, backend="eager")
    callback = LightningPlasticity("random", ratio=0.2, every=4, freq=3, part="net")
    trainer_of(tmp_path, callback).fit(module, loader(6))
    assert callback.profile.samples == 8 and callback.profile["0"].hidden.all()
    assert [reset.step for reset in callback.recycler.log] == [4]


class TwoOptimizers(Classifier):
    """Steps two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(cross_entropy(self.net(images), labels))
        first.step()
        second.step()

    def configure_optimizers(self) -> Any:
        own = [torch.optim.SGD(self.net[part].parameters(), 0.1) for part in (0, 1)]
        return own, []


def test_two_optimizers(tmp_path: Path) -> None:
    callback = LightningPlasticity("random", ratio=0.2, part="net")
    with pytest.raises(InputError, match="2 optimizers train part 'net', expected one: give the"):
        trainer_of(tmp_path, callback).fit(TwoOptimizers(), loader(2))
    callback = LightningPlasticity(freq=2, part="net.0")
    trainer_of(tmp_path, callback).fit(TwoOptimizers(), loader(4))
    assert callback.profile.samples == 8


def test_a_batch_of_another_form(tmp_path: Path) -> None:
    class Triples(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:2], batch_idx)

    images, labels = next(iter(loader(1)))
    triples = DataLoader(list(zip(images, labels, images, strict=True)), batch_size=8)
    with pytest.raises(InputError, match=r"batch 0 is a list of 3, .*or give example_inputs"):
        trainer_of(tmp_path, LightningPlasticity(freq=1)).fit(Triples(), triples)
    callback = LightningPlasticity(freq=1, example_inputs=images[:2])
    trainer_of(tmp_path, callback).fit(Triples(), triples)
    assert callback.profile.samples == 8


@GOES_ON
def test_a_checkpoint_without_a_state(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)
    trainer_of(tmp_path, saves, enable_checkpointing=True).fit(Classifier(), loader(6))
    callback = LightningPlasticity("random", ratio=0.2, every=4, freq=None)
    trainer = trainer_of(tmp_path, callback, saves, enable_checkpointing=True, max_epochs=2)
    trainer.fit(Classifier(), loader(6), ckpt_path=tmp_path / "epoch=0-step=6.ckpt")
    assert [reset.step for reset in callback.recycler.log] == [8, 12]


def test_a_state_of_something_else(tmp_path: Path) -> None:
    callback = LightningPlasticity("random", ratio=0.2)
    callback.load_state_dict({"version": 7})
    with pytest.raises(InputError, match="the state has version 7, expected 1: it was saved by an"):
        trainer_of(tmp_path, callback).fit(Classifier(), loader(2))


def test_other_processes_than_the_first_reinitialise_and_log_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    logger = Rows()
    callback = LightningPlasticity("random", ratio=0.2, every=2, freq=2)
    trainer_of(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(Classifier(), loader(4))
    assert len(callback.recycler.log) == 2 and callback.profile is None
    assert not any("plasticity/reset" in row for row in logger.rows)


def test_parameters_in_shards(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.strategy.__class__ = type("Sharded", (pl.strategies.FSDPStrategy,), {})
    callback = LightningPlasticity(freq=1)
    with pytest.raises(InputError, match="strategy Sharded shards the parameters, expected one wh"):
        callback.on_train_batch_start(trainer, Classifier(), None, 0)
