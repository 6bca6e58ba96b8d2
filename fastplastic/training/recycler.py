"""Re-initialise units or weights on a schedule while a model is trained."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastplastic.errors import InputError, NothingToChooseError, warn
from fastplastic.measure import compare_traces
from fastplastic.model import fingerprint
from fastplastic.planning import Plan, Request, plan, plan_of_units, scored_units
from fastplastic.processes import all_or_nothing, all_processes
from fastplastic.randomness import stream
from fastplastic.reinit import optimizers_of, reinit_
from fastplastic.training.checks import (
    check_arguments,
    copies_of,
    difference,
    graph_of,
    nothing_known,
)
from fastplastic.training.methods import Method, method_of
from fastplastic.training.replacement import Replacement
from fastplastic.training.resets import (
    IN_A_ROW,
    SAME_AGAIN,
    Reset,
    chosen_of,
    overlap,
    takes_the_same,
)
from fastplastic.training.schedule import Schedule
from fastplastic.training.skips import Skips
from fastplastic.training.watch import StepWatch, check_gradients

_VERSION = 1
# The Recycler that acts on a model.
_ACTING: "WeakKeyDictionary[nn.Module, ref[Recycler]]" = WeakKeyDictionary()


class Recycler:
    """Re-initialise what has lost plasticity, again and again, while a model is trained.

        recycler = Recycler(model, images[:2], optimizer, "redo", every=1000)
        for images, labels in loader:
            loss_fn(model(images), labels).backward()
            optimizer.step()
            recycler.step()
            optimizer.zero_grad()

    With `recycler.install()` it follows the optimizer by itself, and `recycler.step()` is not
    called. Resets happen behind a step of the optimizer, never in a backward pass, and what the
    optimizer remembers of the elements that are written begins anew. Statistics are taken in the
    steps that are needed alone; every other step costs a comparison of two numbers.

    Gradients are those in `.grad` when the optimizer has made its step: clipped, unscaled and
    accumulated as it saw them. Calls of the model without gradients (evaluation, acting, target
    networks) are not measured.

    Where processes train one model together, each makes a Recycler of its own, with the same
    arguments. They choose by what all have seen, so that each re-initialises the same, and make as
    many steps: in those that are measured they wait for each other.

    Args:
        model: The model that the loop calls; for a wrapped one (DistributedDataParallel), the
            module inside.
        example_inputs: What to trace the model with, as for `Monitor`. Or the wiring itself, where
            it is known.
        optimizer: The optimizer of the model.
        method: "redo", "cbp", "grama", "swr", "random" (the control), "custom", or a `Method`.
        sync: Copies of the model (target networks, moving averages) in which the same elements
            are given the same values.
        batches: Returns what to measure instead of the running batch, as for `profile`.
        loss_fn: (output, targets) -> loss for `batches`, as for `profile`.
        seed: Any integer. What is drawn depends on it, the step, the parameter and the element.
        options: Fields of `Method` that differ from those of the method.

    Attributes:
        method: The method with its options.
        log: What was re-initialised, a `Reset` for each step in which anything was.
        steps: Steps of the optimizer so far.
        skipped: Why nothing was chosen in a step that was due -> how often.

    Raises:
        InputError: A name or option is unknown or unusable, the optimizer is not that of the model,
            another Recycler acts on the model, it has no unit to choose from, or the model is a
            wrapper.
        ProcessError: The processes have different models or arguments, or one is gone.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: Optimizer,
        method: str | Method = "redo",
        *,
        sync: Sequence[nn.Module] = (),
        batches: Callable[[], Iterable[Any]] | None = None,
        loss_fn: Callable[[Any, Any], Tensor] = cross_entropy,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.method = method_of(method, options)
        self.log: list[Reset] = []
        self.steps = 0
        self.skipped = Skips()
        model = getattr(model, "_orig_mod", model)
        check_arguments(model, optimizer, self.method, batches)
        self._model, self._optimizer, self._sync = model, optimizer, copies_of(sync)
        self._batches, self._loss_fn, self._seed = batches, loss_fn, int(seed)
        self._fingerprint = fingerprint(model)
        self._together = all_processes()
        with all_or_nothing(self._together, "Recycler()", self._facts):
            graph = graph_of(model, example_inputs, optimizer, self.method)
            compare_traces(graph, self._together)
        self._sizes = {layer.name: layer.n_units for layer in graph.layers if layer.hidden.any()}
        self._replacement = (
            None if self.method.rate is None
            else Replacement(self._sizes, self.method, self._seed)
        )  # fmt: skip
        self._schedule = Schedule(self.method)
        self._watch = StepWatch(model, graph, self.method, self._seed, self._together)
        self._last: dict[str, Tensor] | None = None
        self._warned = False
        # Up to which step the ages are counted.
        self._grown = 0
        # Steps that the optimizer has made and `step` was not called for.
        self._pending = 0
        # Calls of the model that were measured when it did.
        self._calls = 0
        # The first step behind which there is anything to do.
        self._next: float = 0
        self._installed = False
        self._handle: RemovableHandle | None = None
        self.attach()

    def __enter__(self) -> "Recycler":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        written = sum(reset.count for reset in self.log)
        return (
            f"Recycler({self.method.name}: {self.steps} steps, {len(self.log)} resets of {written} "
            f"{self.method.granularity}s in all, {sum(self.skipped.values())} skipped)"
        )

    def attach(self) -> None:
        """Act again after `detach`."""
        other = _ACTING.get(self._model)
        acting = None if other is None else other()
        if acting is not None and acting is not self:
            raise InputError(
                f"a Recycler ({acting.method.name}) acts on this model already: detach() it first"
            )
        if self._handle is None:
            _ACTING[self._model] = ref(self)
            innermost = list(optimizers_of(self._optimizer))[-1]
            self._handle = innermost.register_step_post_hook(self._stepped)
            self._look_ahead()

    def detach(self) -> None:
        """Take all hooks off the model and the optimizer; `attach` goes on."""
        self._watch.end()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            _ACTING.pop(self._model, None)

    def install(self) -> "Recycler":
        """Follow the optimizer from now on, so that `step` need not be called; return this."""
        self._installed = True
        return self

    def step(self) -> Reset | None:
        """Tell that the optimizer has made a step; return what was re-initialised, if anything.

        Where the optimizer has made none (gradients are being accumulated), nothing is done.
        """
        if self._installed:
            raise InputError(
                "the Recycler is installed and follows the optimizer by itself: do not call step()"
            )
        if not self._pending:
            self.skipped.wait()
            return None
        self.skipped.end_wait()
        if self._watch.calls > self._calls:
            self.skipped.warn(
                "the model was called between optimizer.step() and recycler.step(), and that call "
                "is measured: call recycler.step() right behind optimizer.step()"
            )
        reset = None
        for _ in range(self._pending):
            reset = self._count_step() or reset
        self._pending = 0
        return reset

    def _stepped(self, *_: Any) -> None:
        if self._installed:
            self._count_step()
        else:
            self._pending += 1
            self._calls = self._watch.calls

    def _count_step(self) -> Reset | None:
        self.steps += 1
        if self.steps < self._next:
            return None
        reset = None
        try:
            if self._schedule.is_measured(self.steps):
                reset = self._act()
        finally:
            self._look_ahead()
        return reset

    def _look_ahead(self) -> None:
        """Measure the next step, or find the one before the next that is measured."""
        following = self.steps + 1
        if self._schedule.is_measured(following) and self._batches is None:
            self._watch.begin(following)
        else:
            self._watch.end()
        self._next = self._schedule.wakes_behind(following)

    def _act(self) -> Reset | None:
        """Measure the step that was just made, and choose if it is time."""
        step = f"step {self.steps} of the Recycler"
        with all_or_nothing(self._together, step, self._facts):
            chosen = self._chosen()
        return self._apply(chosen) if chosen is not None and chosen.count else None

    def _facts(self) -> dict[str, str]:
        """Return what has to be the same in all processes."""
        facts = {"the model": self._fingerprint[:12], "the seed": str(self._seed)}
        facts["the number of copies in sync"] = str(len(self._sync))
        return facts | {name: str(value) for name, value in asdict(self.method).items()}

    def _chosen(self) -> Plan | None:
        """Return what is to be re-initialised; None for nothing."""
        if fingerprint(self._model) != self._fingerprint:
            raise InputError(
                "the model has other parameters than when the Recycler began: make a new one when "
                "the model has changed"
            )
        due = self._schedule.is_due(self.steps)
        try:
            check_gradients(self._model, self.method, self._together)
            chosen = self._replaced(due) if self._replacement else self._planned()
        except NothingToChooseError as error:
            # The same in all processes.
            self.skipped.add(str(error))
            return None
        self.skipped.end_row()
        return chosen

    def _planned(self) -> Plan:
        """Return the plan of a method with a threshold or a ratio."""
        method = self.method
        if self._batches is None:
            seen = self._watch.take()
        else:
            seen = self._watch.of(self._batches(), self._loss_fn)
        return plan(
            seen, criterion=method.criterion, ratio=method.ratio, threshold=method.threshold,
            granularity=method.granularity, scope=method.scope, include=method.include,
            exclude=method.exclude, max_layer_fraction=method.max_layer_fraction,
            seed=self._seed_now(),
        )  # fmt: skip

    def _replaced(self, due: bool) -> Plan | None:
        """Return the plan of a method with a rate; None between two choices."""
        assert self._replacement is not None
        method, seen = self.method, self._watch.take_layers()
        seed = self._seed_now() if method.criterion == "random" else self._seed
        request = Request(
            method.criterion, method.rate, None, "unit", method.scope, method.max_layer_fraction,
            seed, method.include, method.exclude,
        )  # fmt: skip
        scored = scored_units(seen, request)
        unknown = {name: nothing_known(size) for name, size in self._sizes.items()}
        scored = {name: scored.get(name, unknown[name]) for name in self._sizes}
        self._replacement.grow(self.steps - self._grown)
        self._grown = self.steps
        self._replacement.update(
            {name: scores for name, (scores, _) in scored.items()},
            {name: seen[name].stats.mean_h for name in self._sizes},
        )
        if not due:
            return None
        eligible = {name: allowed for name, (_, allowed) in scored.items()}
        units, utilities = self._replacement.choose(eligible, method.every)
        return plan_of_units(seen, request, units, utilities)

    def _seed_now(self) -> int:
        """Return the seed of this step."""
        return int(stream(self._seed, "recycler", str(self.steps)).integers(2**63))

    def _apply(self, chosen: Plan) -> Reset:
        method = self.method
        means = self._replacement.means() if self._replacement and method.compensate else False
        reinit_(
            self._model, chosen, init=method.init,
            outgoing=method.outgoing if method.granularity == "unit" else "zero",
            compensate=means, optimizer=self._optimizer, reset_steps=method.reset_steps,
            copies=self._sync, seed=self._seed_now(),
        )  # fmt: skip
        if self._replacement is not None:
            self._replacement.forget(chosen.units)
        again = overlap(self._last, chosen, self._together)
        reset = Reset(self.steps, chosen.counts, chosen.units, chosen.scores, again)
        self._last = chosen_of(chosen)
        self.log.append(reset)
        self._warn_of_the_same()
        return reset

    def _warn_of_the_same(self) -> None:
        if self._warned or not takes_the_same(self.log):
            return
        self._warned = True
        warn(
            f"step {self.steps}: {IN_A_ROW} times in a row more than {SAME_AGAIN:.0%} of what is "
            "re-initialised is the same as the time before, so resets do nothing: what is drawn "
            "does not learn in between (a longer `every`, outgoing='small', another criterion)"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what later resets depend on, and the log, as values that torch.save takes."""
        return {
            "version": _VERSION,
            "method": asdict(self.method),
            "sizes": dict(self._sizes),
            "seed": self._seed,
            "steps": self.steps,
            "grown": self._grown,
            "skipped": dict(self.skipped),
            "last": self._last,
            "log": [reset.to_dict() for reset in self.log],
            "averages": self._replacement.state_dict() if self._replacement else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, to the same bits as if nothing had been in between.

        Raises:
            InputError: The state is of another version, model, seed or method.
        """
        if state.get("version") != _VERSION:
            raise InputError(
                f"the state has version {state.get('version')!r}, expected {_VERSION}: it was "
                "saved by another version of fastplastic, or is no state of a Recycler"
            )
        own = {"method": asdict(self.method), "sizes": dict(self._sizes), "seed": self._seed}
        for key, value in own.items():
            if state[key] != value:
                raise InputError(
                    f"the state was saved with {key} {difference(state[key], value)}: make the "
                    "Recycler as it was"
                )
        if self._replacement is not None:
            self._replacement.load_state_dict(state["averages"])
        self.steps, self._grown = state["steps"], state["grown"]
        self.skipped, self._last = Skips(state["skipped"]), state["last"]
        self.log = [Reset.from_dict(values) for values in state["log"]]
        self._pending = 0
        if self._handle is not None:
            self._look_ahead()
