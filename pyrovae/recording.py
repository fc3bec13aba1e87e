"""A log-density as a graph of tensor operations, without Pyro's handlers.

Running a Pyro program costs more in handlers than in arithmetic when nets are small. `torch.fx` records the tensor
operations of one evaluation; replaying them gives the same numbers, differentiable as often as the program. The
graph is split in two: what does not depend on the latents (constants of the likelihood, transposed weights) is
evaluated once, the rest at every point.

Data enter the graph as inputs and parameters by reference, so one recording serves batch after batch. It freezes
Python control flow and plain attributes as they were; each use therefore begins by comparing it with the program.
"""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx
from torch.fx import graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pyrovae.batching import RowArguments
from pyrovae.latents import LogJoint
from pyrovae.runtime import modules_of, preserve_rng

__all__ = ["Recording", "Replay", "record", "recorded", "same_draws"]


_aten = torch.ops.aten
_SAME_SHAPE = {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.expand.default}
_ZEROS = {_aten.new_zeros.default, _aten.zeros.default, _aten.zeros_like.default}


# torch keeps the source of every graph for tracebacks, for ever: 20 kB a recording.
_SOURCES: dict[str, str] = getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
_CACHED = 64  # recordings kept for one latent space: one for each shape of batch in use, sentences of every length too


class Recording:
    """`function(u, *inputs)` as two graphs: `at(*inputs)` runs the part without `u` and returns the other part."""

    def __init__(self, fixed: fx.GraphModule, moving: fx.GraphModule) -> None:
        self.fixed, self.moving = fixed, moving

    def at(self, *inputs: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The function of `u` alone, at these inputs."""
        with torch.enable_grad():
            hoisted = self.fixed.forward(*inputs)
        moving = self.moving.forward
        return lambda u: moving(u, *hoisted)


def record(function: Callable[..., tuple[Tensor, ...]], u: Tensor, inputs: Sequence[Tensor]) -> Recording:
    """Record `function(u, *inputs)`.

    Raises:
        RuntimeError: the function's control flow depends on the values of its arguments, or on something else that
            tracing does not support.
    """
    known = {*_SOURCES}
    try:
        whole = make_fx(function)(u.detach(), *inputs)
        graph = whole.graph
        if not any(_mutates(node) for node in graph.nodes):
            _simplify(whole, (u.detach(), *inputs))
        graph.eliminate_dead_code()
        return _split(whole)
    finally:
        for key in {*_SOURCES} - known:
            _SOURCES.pop(key, None)
            linecache.cache.pop(key, None)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps every tensor's shape and dtype."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, tuple[torch.Size, torch.dtype]] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            self.seen[node] = (value.shape, value.dtype)
        return value


def _simplify(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Drop operations that return their argument unchanged: views of the same shape, x * 1, 0 + x."""
    shapes = _Shapes(module)
    with torch.no_grad():
        shapes.run(*inputs)
    seen = shapes.seen
    for node in list(module.graph.nodes):
        args = node.args
        source: Any = None
        same = node.target is _aten.alias.default or (node.target in _SAME_SHAPE and seen[node] == seen[args[0]])
        if same or (node.target is _aten.mul.Tensor and not isinstance(args[1], fx.Node) and args[1] == 1):
            source = args[0]
        elif node.target is _aten.add.Tensor and not node.kwargs:
            for zero, other in (args, args[::-1]):
                if isinstance(zero, fx.Node) and zero.target in _ZEROS and isinstance(other, fx.Node):
                    source = other
        if source is not None and seen[source] == seen[node]:
            node.replace_all_uses_with(source)


def _split(whole: fx.GraphModule) -> Recording:
    """Part the graph into what depends on the first input (or is random, or writes) and what does not."""
    nodes = list(whole.graph.nodes)
    u = nodes[0]
    everything = any(_mutates(node) for node in nodes)  # order matters then: nothing may be evaluated ahead
    moving = {u}
    for node in nodes:
        if node.op == "call_function" and (everything or _is_random(node) or moving & {*node.all_input_nodes}):
            moving.add(node)
    output = nodes[-1]
    needed = [node for node in nodes if node not in moving and node is not output
              and any(user in moving or user is output for user in node.users)]  # fmt: skip

    fixed, body = fx.Graph(), fx.Graph()
    fixed_env: dict[fx.Node, fx.Node] = {}
    body_env: dict[fx.Node, fx.Node] = {u: body.placeholder("u")}
    for node in nodes[1:-1]:
        if node not in moving:
            fixed_env[node] = fixed.node_copy(node, fixed_env.__getitem__)
    fixed.output(tuple(fixed_env[node] for node in needed))
    for number, node in enumerate(needed):
        body_env[node] = body.placeholder(f"fixed_{number}")
    for node in nodes[1:-1]:
        if node in moving:
            body_env[node] = body.node_copy(node, body_env.__getitem__)
    body.output(fx.map_arg(output.args[0], body_env.__getitem__))
    fixed.eliminate_dead_code()
    return Recording(fx.GraphModule(whole, fixed), fx.GraphModule(whole, body))


def recorded(bound: LogJoint, u: Tensor) -> LogJoint | Replay:
    """A log-joint for points of `u`'s shape, as a graph without Pyro's handlers: for inner loops.

    Same numbers and gradients (of any order, also with respect to parameters), same signature. A recording is kept for
    later calls with the same shapes, dtypes, devices, training flags and parameter tensors; every call first compares
    it with the program at `u`. Where the program cannot be recorded (its control flow depends on the latents) a warning
    says so and `bound` itself comes back.
    """
    tensors, rebuild, rest = _flatten(bound.rows)
    cache = bound.space.recordings
    key = (u.shape, u.dtype, u.device, bound.foldable, rest, _identity(bound.space.model),
           tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors))  # fmt: skip
    watch = _Parameters()
    with torch.no_grad(), preserve_rng(), watch:
        _reseed(u)  # a program that draws (dropout) must draw the same for both
        expected = bound.terms(u)
    found = cache.pop(key, None)
    if found is not None:
        recording, parameters = found
        at = None if recording is None else recording.at(*tensors)
        if at is None or (parameters == watch.seen and _agrees(at, u, expected)):
            cache[key] = found
            return bound if at is None else Replay(at)

    def program(point: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        return bound.at_rows(rebuild(leaves)).terms(point)

    new = _try(program, bound, u, tensors)
    cache[key] = new, watch.seen
    while len(cache) > _CACHED:
        cache.pop(next(iter(cache)))
    return bound if new is None else Replay(new.at(*tensors))


def _try(
    program: Callable[..., tuple[Tensor, ...]], bound: LogJoint, u: Tensor, tensors: Sequence[Tensor]
) -> Recording | None:
    """A recording that gave the program's numbers at several points, or None with a warning."""
    try:
        with preserve_rng():
            recording = record(program, u, tensors)
    # Whatever stops the recording does not stop the program: it runs next, and raises what is its own to raise.
    except Exception as error:
        reason = str(error).split("\n")[0].split(". ")[0]
    else:
        generator = torch.Generator().manual_seed(0)
        reason = "its control flow depends on the latents"
        at = recording.at(*tensors)
        with torch.no_grad(), preserve_rng():
            for scale in (0.0, 0.1, 1.0, 3.0):
                shift = torch.randn(u.shape, generator=generator, dtype=u.dtype).to(u.device)
                point = u.detach() + scale * shift
                _reseed(u)
                if not _agrees(at, point, bound.terms(point)):
                    break
            else:
                if _same_gradient(at, bound, u):
                    return recording
                reason = "its gradient is not that of its operations: no_grad, or an autograd.Function"
    warnings.warn(
        f"the log-density cannot be recorded as a graph ({reason}): the program itself runs at every step, with the "
        "same numbers but slower", stacklevel=3,
    )  # fmt: skip
    return None


class Replay:
    """A recorded log-joint: called as `LogJoint` is."""

    def __init__(self, terms: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.terms = terms

    def __call__(self, u: Tensor, beta: float = 1.0) -> Tensor:
        latent, observed = self.terms(u)
        return latent + observed if beta == 1.0 else beta * latent + observed


def _agrees(at: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor, expected: Sequence[Tensor]) -> bool:
    """Whether the graph gives the program's values."""
    with torch.no_grad(), preserve_rng():
        _reseed(u)
        ours = at(u.detach())
    near = 1e-9 if u.dtype == torch.float64 else 1e-4
    return all(torch.allclose(a, b, rtol=near, atol=near, equal_nan=True) for a, b in zip(ours, expected, strict=True))


def _same_gradient(at: Callable[[Tensor], tuple[Tensor, ...]], bound: LogJoint, u: Tensor) -> bool:
    """Whether the graph gives the program's gradient, also with respect to the model's parameters."""
    parameters = [tensor for root in modules_of(bound.space.model) for tensor in root.parameters()]
    parameters = [tensor for tensor in parameters if tensor.requires_grad]
    found = []
    for function in (at, bound.terms):
        with torch.enable_grad():
            leaf = u.detach().clone().requires_grad_()
            _reseed(u)
            total = torch.stack([term.sum() for term in function(leaf)]).sum()
            found.append(torch.autograd.grad(total, [leaf, *parameters], allow_unused=True))
    near = 1e-8 if u.dtype == torch.float64 else 1e-3
    for ours, theirs, like in zip(*found, [leaf, *parameters], strict=True):
        a, b = (torch.zeros_like(like) if one is None else one for one in (ours, theirs))
        if not torch.allclose(a, b, rtol=near, atol=near * (1 + float(b.abs().max())), equal_nan=True):
            return False
    return True


def same_draws(density: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The density of one program out of those that draw (dropout): the same draws at every point.

    Torch's random state is neither moved nor read again: a program that draws nothing gives what it gave before.
    """
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    seed = int(torch.randint(2**62, (), generator=generator))

    def evaluate(u: Tensor, beta: float = 1.0) -> Tensor:
        with preserve_rng():
            _reseed(u, seed)
            return density(u, beta)

    return evaluate


def _reseed(u: Tensor, seed: int = 0) -> None:
    """`torch.manual_seed` of the device at hand alone: in full it costs as much as a small model."""
    torch.default_generator.manual_seed(seed)
    if u.is_cuda:
        torch.cuda.manual_seed(seed)


class _Parameters(Messenger):
    """Which tensors a program's parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, int]] = set()

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        value = msg["value"]
        source = value.unconstrained() if hasattr(value, "unconstrained") else value
        self.seen.add((msg["name"], id(source)))


def _identity(model: Any) -> tuple[Any, ...]:
    """What a graph takes from the model by reference, and the flags that steer its code."""
    found: list[Any] = []
    for root in modules_of(model):
        found += [(id(tensor), tensor.dtype) for tensor in (*root.parameters(), *root.buffers())]
        found += [module.training for module in root.modules()]
    return tuple(found)


def _flatten(rows: RowArguments) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], RowArguments], tuple[Any, ...]]:
    """The tensors among the arguments, a function that puts others in their place, and the rest as a key."""
    leaves, tree = pytree.tree_flatten((rows.args, rows.kwargs))
    where = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    rest = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))

    def rebuild(tensors: Sequence[Tensor]) -> RowArguments:
        new = list(leaves)
        for index, tensor in zip(where, tensors, strict=True):
            new[index] = tensor
        args, kwargs = pytree.tree_unflatten(new, tree)
        return rows.with_values(args, kwargs)

    return [leaves[index] for index in where], rebuild, (*rest, rows.size, rows.carries)
