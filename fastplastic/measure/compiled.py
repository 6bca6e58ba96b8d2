"""How models that torch.compile has compiled are measured.

Compiled code does not look at a model again: hooks that come later are not called, and nothing says
so. Either hooks are traced into the graph (`traced.py`), where the statistics are operators
(`operators.py`), or the step that is measured runs eagerly. What ran without its hooks is counted,
and is an error.
"""

import sys
from collections.abc import Callable
from threading import Lock
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from fastplastic.measure.sums import DeviceSums

# Why a graph cannot hold what is measured.
CALLS = (
    "each call of the model is told to grad_scale, or the model is on several devices: compile the "
    "model itself (torch.compile(model), model.compile()), not a function around it"
)
POSITIONS = (
    "sample_positions draws anew for each call, and compiled code cannot: measure with every=2 or "
    "more, which runs the measured steps eagerly, or leave sample_positions out"
)
DEVICES = "the parameters are on several devices, and compiled code adds to one table"
ATTENTION = (
    "gradients in nn.MultiheadAttention are read off the autograd graph, which compiled code keeps "
    "to itself: measure with every=2 or more"
)

# Tried: 2.11 fails in the backend, 2.14 does not.
TRACES_GRADIENTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
GRADIENTS = (
    f"torch {torch.__version__} cannot compile hooks of gradients, 2.14 and newer can: leave "
    "fullgraph out, measure with every=2 or more, or take a newer torch"
)

# Stances nest, but who wants code to run eagerly begins and ends when it likes: the first enters
# the stance, the last leaves it. Who is thrown away in between does not count.
_LOCK = Lock()
_WANTING: "WeakSet[EagerStance]" = WeakSet()
_STANCE: list[Any] = []
_TRACED_INSIDE = [0]


class EagerStance:
    """Lets compiled code run eagerly between `begin` and `end`; nothing is compiled anew."""

    def begin(self) -> None:
        """Run eagerly from now on."""
        # Without the compiler nothing is compiled, and loading it takes seconds.
        if "torch._dynamo" not in sys.modules:
            return
        with _LOCK:
            if not _STANCE:
                stance = torch.compiler.set_stance("force_eager")
                stance.__enter__()
                _STANCE.append(stance)
            _WANTING.add(self)

    def end(self) -> None:
        """Run compiled code again, unless somebody else wants it to run eagerly."""
        with _LOCK:
            if self in _WANTING:
                _excuse_fullgraph()
            _WANTING.discard(self)
            if not _WANTING and _STANCE:
                _STANCE.pop().__exit__(None, None, None)

    def __enter__(self) -> "EagerStance":
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _excuse_fullgraph() -> None:
    """Let a call with fullgraph=True that is going on end without any compiled code.

    Newer torch looks behind the call whether any was run, and whether code runs eagerly by then.
    """
    frames = sys.modules.get("torch._C._dynamo.eval_frame")
    count = getattr(frames, "set_fullgraph_compiled_frame_count", None)
    if count is not None:
        # Nothing is counted until the next call.
        count(-1)


def anything_is_compiled() -> bool:
    """Tell whether torch.compile has compiled any code of this process since it was reset."""
    converter = sys.modules.get("torch._dynamo.convert_frame")
    return converter is not None and bool(converter.input_codes.seen)


def run_as_is(*functions: Any) -> None:
    """Keep the compiler from compiling functions by themselves.

    Called from code that is being compiled they are traced; hooks of a model are mostly called by
    the interpreter on the way there, and would each become a graph of its own.
    """
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:
        return
    for function in functions:
        frames.skip_code(function.__code__)
    # Asked while a graph is made. The decorator would load the compiler with this module.
    mark: Callable[[Any], Any] = torch.compiler.assume_constant_result
    mark(traces_operator)


def in_compiled_call() -> bool:
    """Tell whether the interpreter is on its way through code of which parts are compiled."""
    frames: Any = sys.modules.get("torch._C._dynamo.eval_frame")
    return frames is not None and frames.get_eval_frame_callback() not in (None, False)


def break_graph(reason: str) -> None:
    """End the graph here, or with fullgraph=True stop the compilation with the reason."""
    torch._dynamo.graph_break(msg=f"fastplastic: {reason}")


def traces_operator() -> bool:
    """Tell whether the body of a higher-order operator (checkpointing) is being traced.

    It may change nothing outside of it, so that hooks in there are noted when they are traced.
    """
    converter: Any = sys.modules["torch._dynamo.symbolic_convert"]
    inside = converter.InstructionTranslator.current_tx().output.current_tracer.parent is not None
    _TRACED_INSIDE[0] += inside
    return bool(inside)


def traced_operators() -> int:
    """Return how often hooks were traced in the body of a higher-order operator."""
    return _TRACED_INSIDE[0]


def keep_address(sums: DeviceSums) -> None:
    """Tell the compiler that tables stay where they are: CUDA graphs then write into them."""
    if "torch._dynamo" in sys.modules:
        for table in (sums.activations, sums.gradients, sums.calls):
            mark: Callable[[Tensor], None] = torch._dynamo.mark_static_address
            mark(table)
