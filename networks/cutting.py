"""Cutting a network that somebody else wrote into stages that are callable on their own.

The forwards of the network and of the ancestors of the named modules are traced once for each
combination of their modes (torch.fx); every other module stays a call, with whatever it does in
training and in evaluation. What is traced is split where one value alone goes on. The code of a
stage runs with the network as its `self`: it holds no module and no tensor, so state dict, `.to()`
and `.train()` of the network are what they were.

What the traced forwards read of the network that is no parameter, buffer or module (a dropout rate,
say) counts as it is when the network is cut, and so does who is called; their hooks never run.
"""

import copy
import difflib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from networks.early_exit import State
from networks.watch import has_hooks

StageCode = Callable[[nn.Module, State], State]
"""From the network and the state before a stage to the state behind it."""


class CannotCut(ValueError):
    """A network, or a place in it, that cannot be cut; says why."""


class End(NamedTuple):
    """Where a module has returned."""

    value: fx.Node | None
    """What it returned; None: it is no single value."""
    position: int
    """Number of operations up to there."""


class Tracer(fx.Tracer):
    """Records what a forward calls, with one argument and its defaults for all others.

    Args:
        opened: modules whose own forward is traced, too.
    """

    proxy_buffer_attributes = True  # or what is made of a buffer would be a constant

    def __init__(self, opened: Sequence[nn.Module]):
        super().__init__()
        self.opened = set(opened)
        self.ends: dict[nn.Module, list[End]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.opened

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list]:
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        value = output.node if isinstance(output, fx.Proxy) else None
        self.ends.setdefault(m, []).append(End(value, len(self.graph.nodes)))
        return output

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):  # fx would make it an attribute, which `.to()` moves nowhere
            raise CannotCut("it uses a tensor that is neither a parameter nor a buffer")
        return super().create_arg(a)


class Trace(NamedTuple):
    """What a network does, operation by operation."""

    nodes: list[fx.Node]
    ends: dict[nn.Module, list[End]]


def trace(network: nn.Module, opened: Sequence[nn.Module]) -> Trace:
    """Traces a network in the present modes of its modules.

    Raises:
        CannotCut: it cannot be traced.
    """
    tracer = Tracer([network, *opened])
    generators = torch.get_rng_state(), random.getstate()
    try:
        graph = tracer.trace(network)
    except Exception as error:  # whatever foreign code does with a value that is not there yet
        reason = str(error).strip().partition("\n")[0]
        raise CannotCut(f"what it computes depends on values: {reason}") from error
    if not torch.equal(torch.get_rng_state(), generators[0]) or random.getstate() != generators[1]:
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        raise CannotCut("its own forward draws a random number, which would be drawn only once")
    return Trace(list(graph.nodes), tracer.ends)


def alive(nodes: Sequence[fx.Node], position: int) -> list[fx.Node]:
    """Returns what is computed before a position and needed behind it; parameters can be reread."""
    later = set(nodes[position:])
    return [
        node
        for node in nodes[:position]
        if node.op != "get_attr" and not later.isdisjoint(node.users)
    ]


def find_end(traced: Trace, module: nn.Module) -> End:
    """Returns the end of a module, if its value alone goes on from there.

    Raises:
        CannotCut: it does not.
    """
    ends = traced.ends.get(module, [])
    if len(ends) != 1:
        raise CannotCut(f"it is called {len(ends)} times" if ends else "it is never called")
    needed = alive(traced.nodes, ends[0].position)
    if len(needed) > 1:
        raise CannotCut(f"{len(needed)} values are needed behind it, and a stage hands on one")
    if needed != [ends[0].value]:
        raise CannotCut("what it returns is not what goes on")
    return ends[0]


def write_code(nodes: Sequence[fx.Node], source: fx.Node, result: Any) -> StageCode:
    """Returns the operations between two values as a function of the network and of the first."""
    graph = fx.Graph()
    own = {source: graph.placeholder("state")}

    def here(node: fx.Node) -> fx.Node:
        if node not in own:  # a parameter that an earlier stage has read
            own[node] = graph.node_copy(node)
        return own[node]

    for node in nodes:
        own[node] = graph.node_copy(node, here)
    graph.output(fx.node.map_arg(result, here))
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<stage of a network that was cut>", "exec"), namespace)
    return namespace["forward"]


def on_meta(module: nn.Module, training: bool | None = None) -> nn.Module:
    """Returns a copy without numbers, to be traced, and run for the shapes alone.

    Whatever a forward remembers or draws, it does so in the copy.

    Args:
        module: stays as it is.
        training: mode of all modules of the copy; None: as they are.

    Raises:
        ValueError: it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    try:
        twin = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{type(module).__name__} cannot be copied: {reason}") from error
    for each in twin.modules() if training is not None else ():
        each.training = training
    return twin


class Cut:
    """A network as a row of stages. Copies and pickles of it are traced anew.

    Args:
        network: takes images.
        after: names of the modules behind which it is cut, in the order in which they run.
        overwriting: numbers of the stages that overwrite what they are given: they get a copy.

    Raises:
        ValueError: the network cannot be cut there; names the nearest place where it can.
    """

    def __init__(self, network: nn.Module, after: Sequence[str], overwriting: Sequence[int] = ()):
        if not after or isinstance(after, str):
            raise ValueError(
                f"after is {after!r}: give a list of names of modules, one for each early exit"
            )
        self.network, self.after, self.overwriting = network, tuple(after), set(overwriting)
        self.opened = to_open(network, after)
        for name, module in self.opened.items():
            if has_hooks(module):
                name = name or type(network).__name__
                raise ValueError(f"{name} is cut, so its hooks would never run: remove them")
        self.codes: dict[tuple[bool, ...], list[StageCode]] = {
            (training,) * len(self.opened): split(on_meta(network, training), after)
            for training in (True, False)
        }
        self.stages = [partial(self._run, index) for index in range(len(after) + 1)]

    def __reduce__(self) -> tuple:
        return Cut, (self.network, self.after, self.overwriting)

    def uniform(self, training: bool) -> list[StageCode]:
        """Returns the stages of a network that is in one mode altogether."""
        return self.codes[(training,) * len(self.opened)]

    def _run(self, index: int, state: State) -> State:
        if index in self.overwriting:
            state = pytree.tree_map_only(Tensor, torch.clone, state)
        modes = tuple([module.training for module in self.opened.values()])
        if modes not in self.codes:  # some of them are frozen
            self.codes[modes] = split(on_meta(self.network), self.after)
        return self.codes[modes][index](self.network, state)


def to_open(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Returns the network and the ancestors of the modules of these names.

    Raises:
        ValueError: there is no such module; names similar ones.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    opened = {"": network}
    for name in names:
        if name not in modules or not name:
            similar = difflib.get_close_matches(str(name), modules, n=3, cutoff=0.3)
            hint = f": similar are {', '.join(similar)}" if similar else ""
            raise ValueError(f"{type(network).__name__} has no module {name!r}{hint}")
        paths = itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
        opened |= {path: modules[path] for path in paths}
    return opened


def split(network: nn.Module, after: Sequence[str]) -> list[StageCode]:
    """Returns the stages of a network, see `Cut`, in the present modes of its modules."""
    ends = []
    try:
        traced = trace(network, to_open(network, after).values())
    except CannotCut as error:
        remedy = _nearest(network, after[-1])
        raise ValueError(f"cannot cut {type(network).__name__}: {error}; {remedy}") from error
    nodes = traced.nodes
    for name in after:
        try:
            end = find_end(traced, network.get_submodule(name))
            if end.value is nodes[-1].args[0]:
                raise CannotCut("nothing follows it")
        except CannotCut as error:
            raise ValueError(
                f"cannot cut after {name}: {error}; {_nearest(network, name)}"
            ) from error
        if ends and end.position <= ends[-1].position:
            raise ValueError(
                f"{name} does not end later than {after[len(ends) - 1]}: give after in the order "
                "in which the modules run, each place once"
            )
        ends.append(end)
    bounds = [End(nodes[0], 1), *ends, End(nodes[-1].args[0], len(nodes) - 1)]
    return [
        write_code(nodes[start.position : stop.position], start.value, stop.value)
        for start, stop in itertools.pairwise(bounds)
    ]


# --- where ----------------------------------------------------------------------------------------


def places_to_cut(network: nn.Module) -> list[str]:
    """Returns the names of the modules behind which a network can be cut, in order of execution.

    Modules that end with the same value, as a block and its last layer, are all there. Whether that
    value has a row for each image is for `WithExits` to see, which runs the network.
    """
    training, evaluation = (
        list(_places(on_meta(network, mode), "", is_last=True)) for mode in (True, False)
    )
    return [name for name in training if name in evaluation]


def _places(module: nn.Module, prefix: str, is_last: bool) -> Iterator[str]:
    """Yields the places inside a module that one value goes into, and one value out of.

    Args:
        module: to be looked into.
        prefix: of the names of its modules.
        is_last: whether it ends the network.
    """
    try:
        traced = trace(module, [])
    except CannotCut:
        return
    for node in traced.nodes:
        if node.op != "call_module":
            continue
        inner, name = module.get_submodule(node.target), prefix + node.target
        try:
            find_end(traced, inner)
        except CannotCut:
            continue
        is_end = is_last and node is traced.nodes[-1].args[0]
        if len(node.args) == 1 and not node.kwargs:
            yield from _places(inner, f"{name}.", is_end)
        if not is_end:
            yield name


def _nearest(network: nn.Module, name: str) -> str:
    """Returns a hint at the place to cut that is nearest to a module."""
    places = places_to_cut(network)
    if not places:
        return "there is no place to cut it"
    order = [each for each, _ in network.named_modules(remove_duplicate=False)]

    def distance(place: str) -> tuple[int, int]:
        pairs = zip(name.split("."), place.split("."), strict=False)
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        return -len(list(shared)), abs(order.index(place) - order.index(name))

    return f"the nearest place is {min(places, key=distance)}"
