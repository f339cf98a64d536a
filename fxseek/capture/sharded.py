"""Models that FSDP2 has sharded: what stands for their parameters in a capture, and in a step.

Dynamo captures neither the hooks by which FSDP gathers parameters nor tensors beside DTensors. So
a call is captured with stand-ins, parameters of full size without memory, and without the hooks. A
step is given this process's shards in their place; its graph gathers them (passes/unshard.py).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from fxseek import _fsdp, _torch
from fxseek.capture.quantised import holds_packed, packed_weight
from fxseek.config import SeekConfig
from fxseek.errors import FxseekError, InputError
from fxseek.ops.shards import Sharding, Unshard
from fxseek.ops.team import Team, as_message, error_of, step_begins, steps_begun, tell
from fxseek.passes.facts import needs_grad
from fxseek.passes.unshard import mark_sharded, sharding_of
from fxseek.program import Program

__all__ = [
    "Shards",
    "collectives_of",
    "config_for_shards",
    "refuse_sharded",
    "refuse_shards",
    "refuse_unreduced",
]

_MESSAGE_BYTES = 2048
_PLANS = 2**32
_SEEDS = 1_000_003


def refuse_sharded(modules: Sequence[tuple[str, nn.Module]], kind: type[FxseekError]) -> None:
    """Refuse what is sharded by anything else than `fully_shard` over one mesh of data."""
    for _ in _shardings(modules, kind):
        pass


def refuse_shards(model: nn.Module, call: str) -> None:
    """Refuse a sharded model, for what reads whole parameters.

    Raises:
        InputError: it is sharded.
    """
    if _fsdp.sharded_modules(model.modules()):
        raise InputError(
            f"{call} runs the model in ways of its own, and reads whole parameters; this one is "
            "sharded by FSDP2. Give it the model before fully_shard, or a small one of its kind."
        )


def refuse_unreduced(model: nn.Module) -> None:
    """Refuse a sharded model whose own backward would leave gradients where they are.

    Raises:
        InputError: `set_requires_gradient_sync` is off.
    """
    if not all(map(_fsdp.reduces, _fsdp.sharded_modules(model.modules()))):
        raise InputError(
            "FSDP2's own backward, which gradients are compared with, does not reduce them at the "
            "moment: call model.set_requires_gradient_sync(True) before the check"
        )


def config_for_shards(config: SeekConfig, kind: type[FxseekError]) -> SeekConfig:
    """How the step of a sharded model is run: no segment keeps whole parameters for backward.

    Each process has draws of its own.

    Raises:
        FxseekError: of this kind: an option doesn't go with shards.
    """
    if config.backend != "eager":
        raise kind(
            f"backend={config.backend!r} with a model that FSDP2 has sharded: its segments gather "
            'parameters, which is not compiled. Use backend="eager".'
        )
    if config.budget is not None:
        raise kind(
            f"memory_budget_bytes={config.memory_budget_bytes!r} with a model that FSDP2 has "
            "sharded: memory is foretold for whole parameters only. Leave it out, and set "
            "learn_chunk=, prefill_chunk= and kv= by hand."
        )
    seed = (config.seed + dist.get_rank() * _SEEDS) % 2**63
    return replace(config, recompute="block", seed=seed)


@dataclass(frozen=True)
class _Known:
    parameter: Any
    sharding: Sharding
    stand_in: nn.Parameter


class Shards:
    """The sharded parameters of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[int, _Known] = {}
        """By the id of the parameter."""
        self._standing: dict[int, _Known] = {}
        """The same by the id of the stand-in."""
        self._casts: dict[nn.Module, tuple[Any, Any]] = {}
        self._agreed = False

    @property
    def exist(self) -> bool:
        """Whether `fully_shard` was there."""
        return bool(_fsdp.sharded_modules(self.model.modules()))

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Meanwhile parameters are stand-ins, and modules cast as FSDP does, but gather nothing."""
        modules = list(self.model.named_modules())
        sharded = _fsdp.sharded_modules(module for _, module in modules)
        _fsdp.begin(sharded)
        for module in sharded:
            module.reshard()
        with contextlib.ExitStack() as undo:
            known: dict[int, _Known] = {}
            for module, name, sharding in _shardings(modules, InputError):
                parameter: Any = getattr(module, name)
                own = known.get(id(parameter))  # tied parameters stay one
                own = own or self._stand_in(module, name, parameter, sharding)
                known[id(parameter)] = own
                undo.callback(_fsdp.set_parameter, module, name, parameter)
                _fsdp.set_parameter(module, name, own.stand_in)
            self._known = known  # others are no parameters any more
            self._standing = {id(x.stand_in): x for x in known.values()}
            for module in sharded:
                for table in _fsdp.hook_tables(module):
                    undo.callback(table.update, dict(table))
                    undo.callback(table.clear)
                self._cast_only(module)
            yield

    def _cast_only(self, module: nn.Module) -> None:
        """In the place of FSDP's hooks put those that cast, if its policy asks for any.

        They are the same in each step: another one would be captured anew.
        """
        casts = self._casts.setdefault(module, _casts_of(module))
        for cast, table in zip(casts, _fsdp.hook_tables(module), strict=True):
            for key in _fsdp.own_hooks(table):
                if cast is None:
                    del table[key]
                else:
                    table[key] = cast

    def moved(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call on the device where the model computes, as FSDP moves them."""
        device = next((x.sharding.team.device for x in self._known.values()), None)

        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        moves = device is not None and device.type != "cpu"
        return (tree_map(move, args), tree_map(move, kwargs)) if moves else (args, kwargs)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A call that fails here before it has begun fails in all processes.

        One that fails later leaves a note for those that wait for this one.
        """
        self._agreed, before = False, steps_begun()
        try:
            yield
        except Exception as error:
            if not self._agreed:
                self._meet(0, error)
            elif steps_begun() > before:
                tell(error)
            raise

    def agree(self, plan: int) -> None:
        """Wait until all processes have come as far, with steps of the same collectives.

        Raises:
            FxseekError: another process has failed; of the class of its error.
            InputError: their steps are not alike.
        """
        self._agreed = True
        self._meet(plan, None)
        step_begins()

    def _meet(self, plan: int, error: Exception | None) -> None:
        teams = [known.sharding.team for known in self._known.values()]
        if not teams:
            return
        team, rank = teams[-1], dist.get_rank()
        failed = 0 if error is None else rank + 1
        # one that has failed has no plan, and contradicts none
        plans = [plan, -plan] if error is None else [0, -_PLANS]
        last, highest, lowest = team.largest(torch.tensor([failed, *plans])).tolist()
        if last:
            own = as_message(error) if error is not None and failed == last else ""
            text = bytearray(own.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"))
            told = team.largest(torch.frombuffer(text, dtype=torch.uint8))
            if error is None:
                message = bytes(told.tolist()).rstrip(b"\0").decode(errors="ignore")
                raise error_of(last - 1, "could not begin its step", message)
        elif highest != -lowest:
            raise InputError(
                "processes have captured steps that gather other parameters, or in another order: "
                "call the model with the same arguments in each, and freeze the same parameters"
            )

    def _stand_in(self, module: nn.Module, name: str, parameter: Any, sharding: Sharding) -> _Known:
        known, trained = self._known.get(id(parameter)), parameter.requires_grad
        if known and known.sharding == sharding and known.stand_in.requires_grad == trained:
            return known
        empty = torch.empty(sharding.shape, dtype=sharding.dtype, device=sharding.team.device)
        empty.untyped_storage().resize_(0)
        stand_in = packed_weight(module, name, empty)
        if stand_in is None:
            stand_in = nn.Parameter(empty, requires_grad=trained)
        return _Known(parameter, sharding, stand_in)

    def mark(self, graph: fx.Graph) -> None:
        """Note on a captured graph which inputs are stand-ins."""
        for node in graph.find_nodes(op="placeholder"):
            known = self._standing.get(id(_torch.given_tensor(node)))
            if known is not None:
                mark_sharded(node, known.sharding)

    def given(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs of a captured graph with this process's shards for stand-ins.

        Gradients of the shards go to the parameters.
        """
        found = [(x, self._standing.get(id(x))) for x in inputs]
        return [x if known is None else known.parameter.to_local() for x, known in found]


def collectives_of(program: Program) -> int:
    """A number for the collectives of a step: other ones have another, as good as surely."""
    gathered: list[Any] = []
    for piece in (program.prefill, *program.learned):
        parts = [part for part in piece.parts.values() if isinstance(part, Unshard)]
        gathered += [[x.name for x in part.shardings] for part in parts]
    stages = [program.score.reads(), [item.node for item in program.gathered]]
    stages += [[] if program.head is None else program.head.stage.reads()]
    gathered += [[x.name for node in nodes if (x := sharding_of(node))] for nodes in stages]
    inputs = program.graph.find_nodes(op="placeholder")
    trained = [x.name for node in inputs if (x := sharding_of(node)) and needs_grad(node)]
    return zlib.crc32(repr((gathered, trained)).encode())


# ---- how parameters are sharded ------------------------------------------------------------------


def _shardings(
    modules: Sequence[tuple[str, nn.Module]], kind: type[FxseekError]
) -> Iterator[tuple[nn.Module, str, Sharding]]:
    """Each sharded parameter: its module, its name there, and how it is sharded."""
    owners = dict.fromkeys(_fsdp.sharded_modules(x for _, x in modules))
    by_name = dict(modules)
    teams: dict[Any, Team] = {}
    found: dict[int, Sharding] = {}
    for path, module in modules:
        for name, parameter in module._parameters.items():
            if not _fsdp.is_sharded(parameter):
                continue
            if id(parameter) not in found:
                full = f"{path}.{name}" if path else name
                owner, packed = _owner(path, by_name, owners), holds_packed(module, name)
                found[id(parameter)] = _sharding(full, parameter, owner, teams, kind, packed=packed)
            yield module, name, found[id(parameter)]


def _owner(path: str, modules: dict[str, nn.Module], owners: dict[Any, None]) -> nn.Module | None:
    """The innermost module around a path that `fully_shard` was called on."""
    while True:
        module = modules.get(path)
        if module in owners:
            return module
        if not path:
            return None
        path = path.rpartition(".")[0]


def _sharding(
    name: str, parameter: Any, owner: nn.Module | None, teams: dict[Any, Team],
    kind: type[FxseekError], *, packed: bool,
) -> Sharding:  # fmt: skip
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = parameter.device_mesh, parameter.placements
    one = len(placements) == 1 and type(placements[0]) is Shard
    both = len(placements) == 2 and isinstance(placements[0], Replicate)
    both = both and type(placements[1]) is Shard
    if owner is None or not (one or both):
        raise kind(
            f"{name!r} is a DTensor with the placements {placements}, which fully_shard alone does "
            "not make: with tensor, sequence or expert parallelism a process holds a part of each "
            "token's activations, and a graph of whole parameters would compute something else. "
            "Shard the model by FSDP2 over a mesh of one dimension, or two (replicate, shard)."
        )
    local = parameter.to_local()
    if type(local.detach()) is not Tensor:
        raise kind(
            f"{name!r} is sharded and of the class {type(local).__name__}: its shards can't be "
            "gathered as plain numbers. Leave it out by fully_shard(..., ignored_params={...})."
        )
    if parameter.is_meta:
        raise kind(f"{name!r} is on the meta device, which has no values: load the weights first")
    if mesh not in teams:
        device = _fsdp.device_of(owner)
        replicas = mesh.get_group(0) if both else None
        teams[mesh] = Team(mesh.get_group(len(placements) - 1), replicas, device)
    if len(teams) > 1:
        raise kind(
            f"{name!r} is sharded over another mesh than other parameters: all must be sharded "
            "over one"
        )
    team = teams[mesh]
    divisors = set()
    for group in _fsdp.groups_of(owner):
        if getattr(group, "_all_reduce_hook", None) is not None:
            raise kind("set_all_reduce_hook is not served: a step has no place for that hook")
        divisors.add(getattr(group, "gradient_divide_factor", None))
    divisor = next(iter(divisors), None)
    policy, dtype = _fsdp.policy_of(owner), parameter.dtype
    if policy.param_dtype is not None and dtype.is_floating_point:
        if packed and policy.param_dtype != dtype:
            raise kind(
                f"{name!r} holds packed numbers of 4 bits as {dtype}, and FSDP2's "
                f"MixedPrecisionPolicy would round them to {policy.param_dtype} as if they were "
                "weights. Load the model with bnb_4bit_quant_storage=that type, or shard it "
                "without param_dtype."
            )
        dtype = policy.param_dtype
    return Sharding(
        name, team, parameter.shape, placements[-1].dim % max(1, parameter.dim()), dtype,
        policy.reduce_dtype, float(team.size if divisor is None else divisor),
    )  # fmt: skip


def _casts_of(module: nn.Module) -> tuple[Any, Any]:
    """A forward pre-hook and a forward hook that cast as FSDP's do, None where they don't."""
    policy = _fsdp.policy_of(module)
    inner = policy.param_dtype if policy.cast_forward_inputs else None
    outer = policy.output_dtype

    def cast_inputs(_: Any, args: Any, kwargs: Any) -> Any:
        return _cast(args, inner), _cast(kwargs, inner)

    def cast_outputs(_: Any, __: Any, outputs: Any) -> Any:
        return _cast(outputs, outer)

    return None if inner is None else cast_inputs, None if outer is None else cast_outputs


def _cast(value: Any, dtype: Any) -> Any:
    """The value with its floating-point tensors in a type."""

    def cast(x: Any) -> Any:
        floating = isinstance(x, Tensor) and x.is_floating_point()
        return x.to(dtype) if floating and x.dtype != dtype else x

    return tree_map(cast, value)
