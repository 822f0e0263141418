"""Asks predictors from inside a transformers model: what its routers will choose next.

Nothing here is known of any family. The norm before each block of experts (or whatever leads from
the residual stream to it) is found by identity during the first forward: its output *is* the
block's input. The next layer's router is then run by a `Ghost` of its block. Where that can't be
done, next-gate is off for the layer and `RouterHooks.report` says why; the model never notices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tiered_mem.hf.ghost import Extra, Ghost, GhostError, RouterBlock, Step
from tiered_mem.hf.route import RouterRoute, last_state, model_info, rank_by_weight
from tiered_mem.policies.prefetch import Predictor, Route
from tiered_mem.policies.prefetch.hash_exact import TABLE, hashed_experts

Hint = Callable[[int, Sequence[int], bool], None]
Observer = Callable[[Route], None]

# A layer that was judged not to pay is asked again now and then, so that it can come back.
_JUDGE_EVERY = 16
_PROBE_EVERY = 32
_MAX_FAILURES = 3  # of a ghost, after which it isn't built again
_NO_EXTRA: Extra = ((), {})
_NOT_THERE = -1


class _Layer:
    """What is known of one layer's surroundings, and its ghost once there is one."""

    def __init__(
        self, index: int, module: nn.Module, block: nn.Module, attribute: str, parent: nn.Module
    ) -> None:
        self.index = index
        self.module = module
        self.num_experts = int(module.num_experts)  # type: ignore[arg-type]
        self.block = block
        self.attribute = attribute  # of the block, that holds the experts
        self.parent = parent  # of the block
        self.table_of: nn.Module | None = None  # the router with a token-to-expert table
        self.steps: list[Step] | None = None  # from the residual stream to the block, once found
        self.has_extra = False  # its block takes more than hidden states
        self.ghost: Ghost | None = None
        self.off = "it has not run yet"
        self.num_failures = 0
        self.num_events = 0
        self.worthwhile = True
        self.next: _Layer = self

    def fail(self, reason: str) -> None:
        self.ghost = None
        self.num_failures += 1
        self.off = reason

    def give_up(self, reason: str) -> None:
        self.num_failures = _MAX_FAILURES
        self.off = reason


class _Call(NamedTuple):
    """A module that was called, with what single tensor (None: with more), what it returned."""

    module: nn.Module
    given: torch.Tensor | None
    output: Any

    def find(self, tensor: torch.Tensor) -> int | None:
        """Where in the output a tensor is: None if it is the output, `_NOT_THERE` if nowhere."""
        if self.output is tensor:
            return None
        elements = self.output if isinstance(self.output, tuple) else ()
        return next((i for i, made in enumerate(elements) if made is tensor), _NOT_THERE)


class _Thread(threading.local):
    """What this thread's forward has come by on its way to the experts."""

    def __init__(self) -> None:
        self.residual: tuple[_Layer, torch.Tensor] | None = None
        self.extra = _NO_EXTRA
        self.calls: list[_Call] = []


class Seen(NamedTuple):
    """What is known where a router has spoken, without having waited for the device."""

    layer: _Layer | None = None  # None: nobody wants to know
    residual: torch.Tensor | None = None
    extra: Extra = _NO_EXTRA
    pays: bool = False
    ahead: tuple[torch.Tensor, ...] = ()  # what the prediction is made of, on the device


class RouterHooks:
    """Predicts the next layer's experts whenever a router has spoken.

    Args:
        model: a transformers model.
        experts: (name, module, layer) of its Experts modules in forward order. Modules of one
            layer number share their weights.
        predictor: see `tiered_mem.policies.prefetch`.
        hint: called with (layer, ranked expert ids, exact) in the thread that generates.
        layer_resident: says that a layer's blocks are all in HBM: nothing is predicted then.
        worthwhile: says whether hints for a layer may still pay; asked every 16 events. One of a
            layer that doesn't pay goes on to be predicted at every 32nd event.

    `info` is what predictors are told of the model; one that can't serve it raises `ConfigError`.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Iterable[tuple[str, nn.Module, int]],
        predictor: Predictor,
        hint: Hint,
        layer_resident: Callable[[int], bool] | None = None,
        worthwhile: Callable[[int], bool] | None = None,
    ) -> None:
        self._predictor = predictor
        self._looks_ahead = predictor.looks_ahead
        self._uses_residual = predictor.looks_ahead or predictor.uses_residual
        self._observer: Observer | None = None
        self._hint = hint
        self._layer_resident = layer_resident
        self._worthwhile = worthwhile
        self._thread = _Thread()
        self._lock = threading.Lock()  # over ghosts in the making and handles
        self._handles: list[RemovableHandle] = []
        self._layers: dict[int, _Layer] = {}
        self._closed = False
        for name, module, index in experts:
            if index not in self._layers:
                path, _, attribute = name.rpartition(".")
                parent = model.get_submodule(path.rpartition(".")[0])
                self._layers[index] = _Layer(
                    index, module, model.get_submodule(path), attribute, parent
                )
        in_order = list(self._layers.values())
        num_experts = max((layer.num_experts for layer in in_order), default=0)
        self.info = model_info(model.config, num_experts)
        predictor.check(self.info)
        if predictor.uses_tables:
            for layer in in_order:
                owners = (m for m in layer.block.modules() if TABLE in m._buffers)
                layer.table_of = next(owners, None)
        if self._uses_residual:
            for layer in in_order:
                self._look_around(layer)
        for layer, following in zip(in_order, in_order[1:] + in_order[:1], strict=True):
            layer.next = following
        self._first = in_order[0] if in_order else None
        self._hashed = [layer for layer in in_order if layer.table_of is not None]
        if predictor.uses_tables and self._hashed:
            self._watch_tokens(model)

    def on_route(self, layer: int, top_k_index: torch.Tensor) -> None:
        """Predict the layer after `layer`, whose router chose `top_k_index` [tokens, k].

        Called by the experts right after they have asked for their own blocks, so that the
        prediction overlaps their loads. On a device that the host would have to wait for, call
        `look` before the ids are copied out, and `predict` with what was copied.
        """
        self.predict(self._see(layer, top_k_index), top_k_index)

    def follows(self, layer: int) -> bool:
        """Whether anybody wants to know on the host what the router of `layer` chose."""
        here = self._layers[layer]
        predictor, following = self._predictor, here.next
        if self._observer is not None or (predictor.follows_routes and predictor.learns):
            return not self._closed
        resident = self._layer_resident
        follows = (
            predictor.follows_routes
            and following.table_of is None
            and not (resident is not None and resident(following.index))
            and not self._closed
        )
        if not follows:
            self._take_residual(here)
        return follows

    def look(self, layer: int, top_k_index: torch.Tensor) -> Seen:
        """Queue on the device what predicting will need: its `ahead` is to be copied out too."""
        seen = self._see(layer, top_k_index)
        if seen.layer is None or not (seen.pays or self._predictor.learns):
            return seen
        ahead: tuple[torch.Tensor, ...] = ()
        if self._predictor.looks_ahead:
            ahead = self._ask_ghost(seen.layer.next, seen.residual, seen.extra)
        elif self._predictor.uses_residual and seen.residual is not None:
            last = last_state(seen.residual, top_k_index.shape[0], self.info.hidden_size)
            ahead = () if last is None else (last,)
        return seen._replace(ahead=ahead)

    def predict(
        self, seen: Seen, top_k_index: torch.Tensor, ahead: Sequence[torch.Tensor] = ()
    ) -> None:
        """Predict by what was seen; `top_k_index` and `ahead` may be its copies on the host."""
        here, observer = seen.layer, self._observer
        if here is None or self._closed:
            return
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            route = self._route(here, seen, top_k_index, ahead)
            if observer is not None:
                observer(route)
            if not (seen.pays or self._predictor.learns) or not self._predictor.follows_routes:
                return
            ranked = self._predictor.predict(route)
        if seen.pays and len(ranked):
            self._hint(here.next.index, ranked, False)

    def forget(self) -> None:
        """Drop what this thread's forward has come by: it starts again."""
        self._thread.residual, self._thread.extra = None, _NO_EXTRA
        self._thread.calls.clear()

    def _see(self, layer: int, top_k_index: torch.Tensor) -> Seen:
        if self._closed or not (self._predictor.follows_routes or self._observer is not None):
            return Seen()
        here = self._layers[layer]
        here.num_events += 1
        residual = self._take_residual(here)
        extra = self._thread.extra if here.has_extra else _NO_EXTRA
        if self._looks_ahead and here.ghost is None:
            with torch.no_grad():
                self._build_ghost(here, residual, extra, top_k_index)
        return Seen(here, residual, extra, self._may_pay(here, here.next))

    def observe(self, observer: Observer | None) -> None:
        """Call `observer` with every `Route` from now on, in the thread that generates; None: no.

        Whatever the predictor, the route then knows its residual and looks ahead by the next gate,
        from the second or third forward on.
        """
        if observer is not None and not self._closed:
            with self._lock:
                known, self._uses_residual, self._looks_ahead = self._uses_residual, True, True
            for layer in self._layers.values() if not known else ():
                self._look_around(layer)
        self._observer = observer

    def report(self) -> dict[int, str]:
        """Return, for each layer, how it is predicted, or why it isn't."""
        return {index: self._report(layer) for index, layer in self._layers.items()}

    def close(self) -> None:
        """Take all hooks off the model. `on_route` does nothing from then on."""
        self._closed = True
        with self._lock:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    # --- finding out what surrounds the experts ---

    def _look_around(self, layer: _Layer) -> None:
        block, parent = layer.block, layer.parent
        if isinstance(parent, nn.ModuleList):
            # The decoder layer itself calls the experts. It can't be run again: it has a KV cache.
            beside = [module for module in block.children() if module is not layer.module]
            self._watch_first_call(layer, beside, layer.module, self._meet_experts)
        elif any(hasattr(m, layer.attribute) for m in parent.children() if m is not block):
            layer.give_up("its block shares its input with another block of experts")
        else:
            beside = [module for module in parent.children() if module is not block]
            self._watch_first_call(layer, beside, block, self._meet_block)

    def _watch_first_call(
        self,
        layer: _Layer,
        beside: list[nn.Module],
        target: nn.Module,
        meet: Callable[[_Layer, tuple[Any, ...], dict[str, Any], list[_Call]], None],
    ) -> None:
        """Call `meet` once, when `target` is first called, with the calls that led there."""
        handles: list[RemovableHandle] = []
        thread = self._thread

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
            thread.calls.append(_Call(module, args[0] if alone else None, output))

        def arrive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls, thread.calls = thread.calls, []
            with self._lock:
                if self._closed or not handles:  # another thread was first
                    return
                for handle in handles:
                    handle.remove()
                handles.clear()
                meet(layer, args, kwargs, calls)

        handles += [m.register_forward_hook(keep, with_kwargs=True) for m in beside]
        handles.append(target.register_forward_pre_hook(arrive, with_kwargs=True))
        self._handles += handles

    def _meet_block(
        self, layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any], calls: list[_Call]
    ) -> None:
        if not args:
            layer.give_up("its block takes no positional argument")
            return
        layer.has_extra = len(args) > 1 or bool(kwargs)
        self._watch_residual(layer, _steps_to(args[0], calls), layer.block)
        if layer.has_extra:
            keep = self._keep_extra
            self._handles.append(layer.block.register_forward_pre_hook(keep, with_kwargs=True))

    def _meet_experts(
        self, layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any], calls: list[_Call]
    ) -> None:
        if len(args) < 3:
            layer.give_up("its experts take no positional arguments")
            return
        for call in calls:
            ids, weights = (call.find(tensor) for tensor in args[1:3])
            if call.given is not None and _NOT_THERE not in (ids, weights):
                layer.block = RouterBlock(call.module, layer.module, ids, weights)
                layer.attribute = "experts"
                self._watch_residual(layer, _steps_to(call.given, calls), call.module)
                return
        layer.give_up("no router beside its experts has what they were called with")

    def _watch_residual(self, layer: _Layer, steps: list[Step], last: nn.Module) -> None:
        layer.steps = steps
        head = steps[0].module if steps else last
        self._handles.append(head.register_forward_pre_hook(self._keep_residual(layer)))

    def _keep_residual(self, layer: _Layer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        thread = self._thread

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            thread.residual = (layer, args[0])

        return keep

    def _keep_extra(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._thread.extra = args[1:], kwargs

    def _take_residual(self, layer: _Layer) -> torch.Tensor | None:
        # Taken, not kept: a prefill's residual is large.
        self._thread.calls.clear()
        residual, self._thread.residual = self._thread.residual, None
        return residual[1] if residual is not None and residual[0] is layer else None

    def _build_ghost(
        self, layer: _Layer, residual: torch.Tensor | None, extra: Extra, top_k_index: torch.Tensor
    ) -> None:
        """Make the ghost of a layer at its first event, which says whether the ghost is right."""
        if layer.ghost is not None or residual is None or layer.num_failures >= _MAX_FAILURES:
            return
        if layer.steps is None or layer.module.training:
            return
        with self._lock:
            if layer.ghost is not None or layer.table_of is not None:
                return
            try:
                ghost = Ghost(layer.steps, layer.block, layer.attribute)
                ghost.calibrate(residual, extra, top_k_index)
            except GhostError as error:
                layer.fail(str(error))
            else:
                layer.ghost, layer.off = ghost, ""

    # --- predicting ---

    def _may_pay(self, here: _Layer, following: _Layer) -> bool:
        if following.table_of is not None:  # predicted already, from token ids
            return False
        if self._layer_resident is not None and self._layer_resident(following.index):
            return False
        if self._worthwhile is None:
            return True
        if here.num_events % _JUDGE_EVERY == 0:
            following.worthwhile = self._worthwhile(following.index)
        return following.worthwhile or here.num_events % _PROBE_EVERY == 0

    def _route(
        self, here: _Layer, seen: Seen, top_k_index: torch.Tensor, ahead: Sequence[torch.Tensor]
    ) -> RouterRoute:
        def look_ahead() -> Sequence[int]:
            ids_and_weights = ahead
            if not (self._predictor.looks_ahead and ahead):
                ids_and_weights = self._ask_ghost(here.next, seen.residual, seen.extra)
            return rank_by_weight(*ids_and_weights) if ids_and_weights else ()

        return RouterRoute(
            here.index,
            here.next.index,
            (here.num_experts, here.next.num_experts),
            self.info.hidden_size,
            top_k_index,
            seen.residual,
            look_ahead,
            last=ahead[0] if ahead and not self._predictor.looks_ahead else None,
        )

    def _ask_ghost(
        self, following: _Layer, residual: torch.Tensor | None, extra: Extra
    ) -> tuple[torch.Tensor, ...]:
        """Return ids [tokens, up to 2k] and weights as the next gate ranks them; () if it can't."""
        ghost = following.ghost
        # After the last layer there is no residual stream that the first one will see.
        if ghost is None or residual is None or following is self._first:
            return ()
        try:
            with torch.no_grad():
                return ghost.route(residual, extra)
        except torch.OutOfMemoryError:  # a prediction isn't worth what it would take to make room
            return ()
        except Exception as error:
            # The model was changed under the ghost. It is built again, from what is there then.
            following.fail(f"its router doesn't run alone: {error!r}")
            return ()

    def _watch_tokens(self, model: nn.Module) -> None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]

        def look_up(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args or self._closed:
                return
            for layer in self._hashed:
                resident = self._layer_resident
                if layer.table_of is None or (resident is not None and resident(layer.index)):
                    continue
                try:
                    ranked = hashed_experts(getattr(layer.table_of, TABLE), args[0])
                except (IndexError, RuntimeError):
                    return  # not token ids of this model: its own embedding says so next
                self._hint(layer.index, ranked, True)

        self._handles.append(embedding.register_forward_pre_hook(look_up))

    def _report(self, layer: _Layer) -> str:
        if layer.table_of is not None:
            return "exact, from token ids"
        if not self._predictor.looks_ahead:
            before = next(other for other in self._layers.values() if other.next is layer)
            blind = self._predictor.uses_residual and before.steps is None
            return f"off: layer {before.index}: {before.off}" if blind else self._predictor.name
        if layer is self._first:
            return "off: no layer comes before it"
        if layer.ghost is None:
            return f"off: {layer.off}"
        return f"{self._predictor.name}, {layer.ghost.num_ranked} experts ranked"


def _steps_to(tensor: torch.Tensor, calls: list[_Call]) -> list[Step]:
    """The modules, each called with one tensor alone, that made `tensor` one from another.

    Such a module keeps no cache, so it may be called again. Two of them follow each other where
    the residual has several streams: one that joins them, and the norm.
    """
    steps: list[Step] = []
    for call in reversed(calls):
        element = call.find(tensor)
        if call.given is not None and element != _NOT_THERE:
            steps.insert(0, Step(call.module, element))
            tensor = call.given
    return steps
