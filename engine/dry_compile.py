"""What compiled regions keep and take: torch.compile up to the graphs that Inductor would turn into kernels.

Dynamo, AOTAutograd's min-cut partitioner, the memory budget and the checkpointing policies all run as they do in
training, so what a forward graph hands to its backward graph is exact. What exists inside a graph is a model of
Inductor: pointwise operations and reductions are fused, and only what a kernel reads whole (a matrix product,
attention), what is too much to compute twice, or what leaves the graph is written to memory; a fused kernel may write
over what it is the last to read.
"""

import contextlib
import operator
from collections.abc import Iterator

import torch
import torch.fx as fx
import torch.nn as nn
from torch.utils._pytree import tree_iter

from engine.config import Compile, Config
from engine.tape import Tape

POINTWISE = {  # fused by Inductor, without torch's tag
    "aten.arange.start_step",
    "aten.cat.default",
    "aten.clone.default",
    "aten.constant_pad_nd.default",
    "aten.embedding.default",
    "aten.full.default",
    "aten.full_like.default",
    "aten.gather.default",
    "aten.index.Tensor",
    "aten.scalar_tensor.default",
    "aten.scatter.value",
    "aten.select_scatter.default",
    "aten.slice_scatter.default",
    "aten.where.self",
    "prims.convert_element_type.default",
    "prims.fma.default",
    "prims.inductor_random.default",
    "prims.inductor_lookup_seed.default",
    "prims.iota.default",
}
# Inductor computes a pointwise value anew in each of its readers while it reads and computes no more than the first
# two, and within a single one while no more than the others (its realize_… settings, on a GPU).
SHARED_READS, SHARED_OPERATIONS = 4, 30
MOST_READS, MOST_OPERATIONS = 8, 100
VIEWS = {  # where no example value tells
    "aten.expand.default",
    "aten.permute.default",
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
    "aten.unbind.int",
    "aten.view.default",
}
REDUCTIONS = {
    "aten.amax.default",
    "aten.amin.default",
    "aten.mean.dim",
    "aten.sum.default",
    "aten.sum.dim_IntList",
    "aten.var_mean.correction",
    "prims.prepare_softmax_online.default",
}


@contextlib.contextmanager
def settings(config: Config) -> Iterator[None]:
    """The compiler's settings for this run; what it makes here is kept in no cache."""
    import torch._functorch.config

    m = config.memory
    budget = m.memory_budget if m.activation_checkpointing == "budget" else 1.0
    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=budget, enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def apply(model: nn.Module, settings: Compile, tape: Tape) -> None:
    """As compiling.apply, but for regions that only report to `tape`."""
    from torch._inductor.compile_fx import compile_fx

    def planned(kind: str, part: str):
        def compile_graph(graph, _inputs, *, is_backward=False, **_options):
            return region(graph, tape, ("temporary" if is_backward else kind, part))

        return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=compile_graph)

    blocks = {
        "backend": planned("activations", "residual stream"),
        "dynamic": False,
        "fullgraph": settings.compile_fullgraph,
    }
    if settings.compile == "blocks":
        for block in model.layers:
            block.compile(**blocks)
    else:
        model.features = torch.compile(model.features, **blocks)
    model.loss.compile(**(blocks | {"backend": planned("logits", "logits")}))
    tape.label_calls(model.loss, "logits", kind="logits")


def region(graph: fx.GraphModule, tape: Tape, label):
    """The compiled `graph`: called with its inputs in a list, which it empties, it returns fake outputs."""
    plan = Region(graph)

    def run(*args):
        if len(args) == 1 and isinstance(args[0], list):
            (args,) = args
        else:
            args = list(args)
        return plan(args, tape, label)

    run._boxed_call = True
    return run


class Region:
    """A graph, and which of its values are written to memory, and until when each is read."""

    def __init__(self, graph: fx.GraphModule):
        self.graph = graph
        self.nodes = list(graph.graph.nodes)
        self.kinds = {node: _kind(node) for node in self.nodes}
        self.written: set[fx.Node] = set()
        self.reads: dict[fx.Node, set[fx.Node]] = {}  # what computing a node reads from memory
        self.operations: dict[fx.Node, int] = {}  # how many computing it takes
        for node in self.nodes:
            self._decide(node)
        self.last_read = self._last_reads()
        self._fuse_siblings()
        self.freed: dict[fx.Node, list[fx.Node]] = {}
        for node, reader in self.last_read.items():
            self.freed.setdefault(reader, []).append(node)

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Who reads `node`, itself or as a view."""
        for user in node.users:
            yield user
            if self.kinds[user] == "view":
                yield from self._readers(user)

    def _decide(self, node: fx.Node) -> None:
        """Whether `node` is written to memory, once it is known of all that it depends on."""
        kind = self.kinds[node]
        self.reads[node], self.operations[node] = set(), int(kind != "view")
        for source in node.all_input_nodes:
            if source in self.written or self.kinds[source] == "input":
                self.reads[node].add(source)
            else:
                self.reads[node] |= self.reads[source]
                self.operations[node] += self.operations[source]
        if kind in ("kernel", "reduction") or (kind == "pointwise" and self._is_kept(node)):
            self.written.add(node)

    def _is_kept(self, node: fx.Node) -> bool:
        """Whether a pointwise value gets memory of its own: its readers need it there, or would compute too much."""
        if any(self.kinds[reader] in ("kernel", "output") for reader in self._readers(node)):
            return True
        reads, operations = len(self.reads[node]), self.operations[node]
        shared = len(node.users) > 1 and (reads > SHARED_READS or operations > SHARED_OPERATIONS)
        return shared or reads > MOST_READS or operations > MOST_OPERATIONS

    def _last_reads(self) -> dict[fx.Node, fx.Node]:
        """For each node, the node at which its value is needed last: what is fused reads when it is written."""
        position = {node: i for i, node in enumerate(self.nodes)}
        last = {}
        for node in reversed(self.nodes):
            ends = [node]
            for user in node.users:
                through = self.kinds[user] == "view" or user not in self.written
                ends.append(last[user] if through and self.kinds[user] != "output" else user)
            last[node] = max(ends, key=position.__getitem__)
        return last

    def _fuse_siblings(self) -> None:
        """Pointwise kernels that read the same large value become one: what the first writes is there at the last."""
        position = {node: i for i, node in enumerate(self.nodes)}
        before: dict[fx.Node, int] = {}  # all that a node depends on, as bits
        for node in self.nodes:
            before[node] = 0
            for source in node.all_input_nodes:
                before[node] |= before[source] | 1 << position[source]
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if node not in self.written or self.kinds[node] != "pointwise":
                continue
            for source in self.reads[node]:
                if not _size(source) or _size(source) < _size(node):
                    continue
                for first in readers.setdefault(source, []):
                    if not before[node] >> position[first] & 1:
                        self.last_read[first] = max(self.last_read[first], node, key=position.__getitem__)
                readers[source].append(node)

    def __call__(self, args: list, tape: Tape, label) -> list:
        kind, part = label
        values, args = (
            dict(zip(self.graph.graph.find_nodes(op="placeholder"), list(args), strict=True)),
            args.clear(),
        )
        for node in self.nodes:
            if node.op == "output":
                return [values[o] if isinstance(o, fx.Node) else o for o in node.args[0]]
            if node.op == "get_attr":
                values[node] = getattr(self.graph, node.target)
            elif node.op != "placeholder":
                self._compute(node, values, tape, (kind, _part(node) or part))
            for dead in self.freed.get(node, ()):
                values.pop(dead, None)
        raise AssertionError("a graph without an output")

    def _compute(self, node: fx.Node, values: dict, tape: Tape, label) -> None:
        """The fake value of `node`; what is written to memory is counted, and may take the place of what dies."""
        own_args, own_kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        with tape.off():
            value = _call(node.target, own_args, own_kwargs)
        del own_kwargs
        if node in self.written:
            if size := tape.work_memory(node.target, own_args):
                tape.give(tape.take(size, ("temporary", "work memory of kernels")))
            del own_args
            if self.kinds[node] != "kernel":
                self._write_over(node, value, values)
            for tensor in tree_iter(value):
                if isinstance(tensor, torch.Tensor):
                    tape.add(tensor, label)
        values[node] = value

    def _write_over(self, node: fx.Node, value, values: dict) -> None:
        """Drop one value of the same size that nobody reads after `node`, with its views."""
        if not isinstance(value, torch.Tensor):
            return
        dying = [n for n in self.freed.get(node, ()) if isinstance(values.get(n), torch.Tensor)]
        for one in dying:
            storage = values[one].untyped_storage()
            in_memory = one in self.written or one.op == "placeholder"
            if in_memory and storage.nbytes() == value.untyped_storage().nbytes():
                same = [n for n in dying if values[n].untyped_storage()._cdata == storage._cdata]
                for n in same:
                    del values[n]
                return


def _kind(node: fx.Node) -> str:
    """input, output, view, pointwise, reduction, or a kernel of its own."""
    if node.op != "call_function":
        return "output" if node.op == "output" else "input"
    if node.target is operator.getitem or str(node.target) in VIEWS or _is_view(node):
        return "view"
    if not isinstance(node.target, torch._ops.OpOverload):
        return "kernel"
    if str(node.target) in REDUCTIONS:
        return "reduction"
    if torch.Tag.pointwise in node.target.tags or str(node.target) in POINTWISE:
        return "pointwise"
    return "kernel"


def _call(target, args: tuple, kwargs: dict):
    """Call `target`; an operation whose random state is saved or replayed is called alone: a state is no fake."""
    if target is torch.ops.higher_order.run_and_save_rng_state:
        return torch.empty(0, dtype=torch.uint8), args[0](*args[1:], **kwargs)
    if target is torch.ops.higher_order.run_with_rng_state:
        return args[1](*args[2:], **kwargs)
    return target(*args, **kwargs)


def _is_view(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    inputs = (n.meta.get("val") for n in node.all_input_nodes)
    own = value.untyped_storage()._cdata
    return any(isinstance(i, torch.Tensor) and i.untyped_storage()._cdata == own for i in inputs)


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else 0


def _part(node: fx.Node) -> str:
    """The submodule of a block that `node` comes from: attention, mlp, norm1 …"""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    parts = [path for path, _ in stack.values()]
    names = parts[-1].replace("._checkpoint_wrapped_module", "").split(".") if parts else []
    return next((n for n in names if n in ("attention", "mlp", "norm1", "norm2", "norm")), "")
