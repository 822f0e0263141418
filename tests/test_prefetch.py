"""Predictors and the hooks that ask them, on tiny models and with a `hint` that only listens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import families
import pytest
import torch
from tiered_mem.policies.prefetch import list_predictors, make_predictor
from tiered_mem.policies.prefetch.previous_token import PreviousToken
from torch import nn
from transformers import PreTrainedModel

from tiered_mem.errors import ConfigError
from tiered_mem.hf.detect import find_experts
from tiered_mem.hf.prefetch import RouterHooks

TAKING_PART = [name for name in families.families() if name not in families.LEFT_OUT]
# Families whose next gate can't be run early, and why.
OFF = {"ernie4_5_vl_moe": "shares its input with another block of experts"}


class Listener:
    """Drives hooks the way the experts function does; keeps hints and routes in their order."""

    def __init__(self, model: PreTrainedModel, predictor: str, **options: Any) -> None:
        self.hints: list[tuple[int, int, list[int], bool]] = []  # thread, layer, ids, exact
        self.routes: list[tuple[int, int, list[int]]] = []  # thread, layer, ids
        experts = find_experts(model)
        self.hooks = RouterHooks(model, experts, make_predictor(predictor), self.hint, **options)
        self._handles = [e.module.register_forward_pre_hook(self._route(e.layer)) for e in experts]

    def hint(self, layer: int, ids: Sequence[int], exact: bool) -> None:
        self.hints.append((threading.get_ident(), layer, list(ids), exact))

    def _route(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def route(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.routes.append((threading.get_ident(), layer, args[1].unique().tolist()))
            self.hooks.on_route(layer, args[1])

        return route

    def of_layer(self, layer: int) -> list[list[int]]:
        return [ids for _, to, ids, _ in self.hints if to == layer]

    def routed(self, layer: int) -> list[list[int]]:
        return [ids for _, at, ids in self.routes if at == layer]

    def close(self) -> None:
        self.hooks.close()
        for handle in self._handles:
            handle.remove()


@contextmanager
def listening(model: PreTrainedModel, predictor: str, **options: Any) -> Iterator[Listener]:
    listener = Listener(model, predictor, **options)
    try:
        yield listener
    finally:
        listener.close()


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def silence(model: nn.Module) -> None:
    """Let attention, experts and the like add nothing: every layer sees the same residual."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("o_proj", "down_proj", "per_layer_projection")):
            parameter.zero_()


# --- choosing a predictor ---


def test_predictors_are_listed_and_made_by_name() -> None:
    names = [info.name.partition("(")[0] for info in list_predictors()]
    assert names[:3] == ["none", "next-gate", "previous-token"]
    assert {"frequency", "transition", "eam", "hash-exact", "learned", "oracle"} < set(names)
    for info in list_predictors():
        assert info.summary and info.source
        if "(" not in info.name or "([" in info.name:  # all that it takes may be left away
            name = info.name.partition("(")[0]
            assert make_predictor(name).name == name


def test_an_unknown_predictor_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'clairvoyant'.*hash-exact, learned, next-gate, none"):
        make_predictor("clairvoyant")


# --- the model never notices ---


@pytest.mark.parametrize("name", TAKING_PART)
def test_next_gate_leaves_every_family_as_it_is(name: str) -> None:
    model, inputs = families.build(name)
    expected, hooks_before = families.logits(model, inputs), num_hooks(model)
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    random_state = torch.get_rng_state()
    residuals: list[tuple[int, Any]] = []
    with listening(model, "next-gate") as listener:
        # The first forward finds the norms, the second makes the ghosts, the third predicts.
        for _ in range(3):
            listener.hooks.observe(lambda route: residuals.append((route.layer, route.residual())))
            assert torch.equal(families.logits(model, inputs), expected)
        report, hidden_size = listener.hooks.report(), listener.hooks.info.hidden_size

    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())
    assert num_hooks(model) == hooks_before
    later = {layer: line for layer, line in report.items() if layer > 0}
    if name in OFF:
        assert all(OFF[name] in line for line in later.values())
    else:
        assert all(line.startswith("next-gate") for line in later.values()), report
        assert {layer for _, layer, _, _ in listener.hints} >= set(later)
        # None in the first forward, and where modules share a layer at all but one of them.
        known = {layer: residual.shape for layer, residual in residuals if residual is not None}
        assert known == dict.fromkeys(report, (hidden_size,))
    for _, _, ids, _ in listener.hints:
        assert ids and len(set(ids)) == len(ids) and set(ids) <= set(range(families.NUM_EXPERTS))


def test_router_logits_are_collected_as_if_nobody_looked_ahead() -> None:
    model, inputs = families.build("mixtral")
    expected = model(**inputs, output_router_logits=True).router_logits
    calls: list[nn.Module] = []
    gate = model.get_submodule("model.layers.1.mlp.gate")
    handle = gate.register_forward_hook(lambda module, args, output: calls.append(module))
    with listening(model, "next-gate") as listener:
        for _ in range(3):
            result = model(**inputs, output_router_logits=True)
    handle.remove()
    assert listener.of_layer(1)
    assert len(calls) == 3
    assert len(result.router_logits) == len(expected)
    assert all(map(torch.equal, result.router_logits, expected))


def test_training_mode_draws_the_same_random_numbers_and_predicts_nothing() -> None:
    model, inputs = families.build("mixtral")
    for layer in model.model.layers:
        layer.mlp.jitter_noise = 0.1
    model.train()
    torch.manual_seed(1)
    expected = families.logits(model, inputs)
    with listening(model, "next-gate") as listener:
        for _ in range(3):
            torch.manual_seed(1)
            assert torch.equal(families.logits(model, inputs), expected)
    assert not listener.hints


def test_a_router_that_counts_in_a_buffer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = families.build("mixtral")
    gate = model.get_submodule("model.layers.1.mlp.gate")
    gate.register_buffer("num_calls", torch.zeros(()))
    forward = type(gate).forward

    def counting(self: Any, hidden_states: torch.Tensor) -> Any:
        if hasattr(self, "num_calls"):
            self.num_calls += 1
        return forward(self, hidden_states)

    monkeypatch.setattr(type(gate), "forward", counting)
    with listening(model, "next-gate") as listener:
        for _ in range(8):
            families.logits(model, inputs)
        assert "keeps statistics" in listener.hooks.report()[1]
    assert gate.num_calls == 8
    assert not listener.of_layer(1) and listener.of_layer(2)


def test_a_router_that_fails_alone_turns_its_layer_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = families.build("mixtral")
    expected = families.logits(model, inputs)
    gate = model.get_submodule("model.layers.1.mlp.gate")
    forward = type(gate).forward

    def picky(self: Any, hidden_states: torch.Tensor) -> Any:
        if self.weight is gate.weight and self is not gate:
            raise ValueError("only the real one")
        return forward(self, hidden_states)

    monkeypatch.setattr(type(gate), "forward", picky)
    with listening(model, "next-gate") as listener:
        for _ in range(8):
            assert torch.equal(families.logits(model, inputs), expected)
        assert "only the real one" in listener.hooks.report()[1]
    assert not listener.of_layer(1) and listener.of_layer(2)


def test_a_forward_set_on_an_instance_is_not_run_by_the_ghost() -> None:
    """accelerate wraps forwards so: its wrapper would run the real block, experts and all."""
    model, inputs = families.build("qwen2_moe")
    block = model.get_submodule("model.layers.1.mlp")
    calls: list[int] = []
    original = block.forward

    def wrapped(hidden_states: torch.Tensor) -> Any:
        calls.append(1)
        return original(hidden_states)

    block.forward = wrapped
    with listening(model, "next-gate") as listener:
        for _ in range(3):
            families.logits(model, inputs)
    assert listener.of_layer(1)
    assert len(calls) == 3


def test_after_close_nothing_is_predicted() -> None:
    model, inputs = families.build("mixtral")
    before = num_hooks(model)
    listener = Listener(model, "next-gate")
    families.logits(model, inputs)
    families.logits(model, inputs)
    listener.hooks.close()
    listener.hints.clear()
    families.logits(model, inputs)
    assert not listener.hints
    listener.close()
    assert num_hooks(model) == before


# --- next-gate ---


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "flex_olmo", "gemma4"]
)
def test_next_gate_is_right_where_layers_add_nothing(name: str) -> None:
    model, inputs = families.build(name)
    silence(model)
    token = {key: value[:1, :1] for key, value in inputs.items()}
    with listening(model, "next-gate") as listener:
        for _ in range(3):
            families.logits(model, token)
    for layer in listener.hooks.report():
        if layer == 0:
            continue
        used, predicted = listener.routed(layer)[-1], listener.of_layer(layer)[-1]
        assert len(predicted) == 2 * families.TOP_K
        assert set(predicted) >= set(used)
        if name not in ("deepseek_v3", "gemma4"):  # these rank by weights other than the choice
            assert set(predicted[: families.TOP_K]) == set(used)


def test_next_gate_follows_a_change_of_dtype() -> None:
    model, inputs = families.build("mixtral")
    with listening(model, "next-gate") as listener:
        families.logits(model, inputs)
        families.logits(model, inputs)
        model.to(torch.bfloat16)
        listener.hints.clear()
        families.logits(model, inputs)
        assert listener.of_layer(1) and listener.of_layer(2)


def test_many_tokens_are_ranked_by_their_summed_weights() -> None:
    model, inputs = families.build("mixtral")
    silence(model)
    weights: dict[int, float] = dict.fromkeys(range(families.NUM_EXPERTS), 0.0)

    def add_up(module: nn.Module, args: tuple[Any, ...]) -> None:
        for ids, shares in zip(args[1].tolist(), args[2].tolist(), strict=True):
            for index, share in zip(ids, shares, strict=True):
                weights[index] += share

    with listening(model, "next-gate") as listener:
        families.logits(model, inputs)
        families.logits(model, inputs)
        # With twice the experts chosen from, the weights of the wider choice are what is ranked.
        model.model.layers[1].mlp.gate.top_k = 2 * families.TOP_K
        experts = model.get_submodule("model.layers.1.mlp.experts")
        handle = experts.register_forward_pre_hook(add_up)
        families.logits(model, inputs)
        handle.remove()
    ranked = listener.of_layer(1)[-1]
    used = [index for index in weights if weights[index] > 0]
    assert ranked == sorted(used, key=lambda index: -weights[index])


# --- previous-token and tables ---


def test_previous_token_repeats_the_next_layers_last_event() -> None:
    model, inputs = families.build("mixtral")
    with listening(model, "previous-token") as listener:
        families.greedy(model, {"input_ids": inputs["input_ids"][:1, :1]})
    last: dict[int, list[int]] = {}
    hints = iter(listener.hints)
    for _, layer, ids in listener.routes:
        last[layer] = ids
        following = (layer + 1) % 3
        if following in last:
            _, hinted, predicted, exact = next(hints)
            assert (hinted, sorted(predicted), exact) == (following, last[following], False)
    assert next(hints, None) is None
    assert len(listener.hints) > 10


@pytest.mark.parametrize("predictor", ["hash-exact", "next-gate", "previous-token"])
def test_layers_with_a_table_are_predicted_exactly(predictor: str) -> None:
    model, inputs = families.build("deepseek_v4")
    with listening(model, predictor) as listener:
        families.greedy(model, inputs)
        assert listener.hooks.report()[0] == "exact, from token ids"
    exact = [(layer, sorted(ids)) for _, layer, ids, is_exact in listener.hints if is_exact]
    assert exact == [(0, ids) for ids in listener.routed(0)]
    assert len(exact) == 6
    assert not [1 for _, layer, _, is_exact in listener.hints if layer == 0 and not is_exact]
    assert bool(listener.of_layer(1)) == (predictor != "hash-exact")


def test_none_says_nothing() -> None:
    model, inputs = families.build("deepseek_v4")
    before = num_hooks(model)
    with listening(model, "none") as listener:
        assert num_hooks(model) - before == len(listener.hooks.report())  # the listener's own
        families.greedy(model, inputs)
    assert listener.routes and not listener.hints


# --- when it isn't worth while ---


def test_layers_in_hbm_are_not_predicted() -> None:
    model, inputs = families.build("mixtral")
    resident = {1}
    with listening(model, "next-gate", layer_resident=resident.__contains__) as listener:
        for _ in range(3):
            families.logits(model, inputs)
        assert not listener.of_layer(1) and listener.of_layer(2)
        resident.clear()
        families.logits(model, inputs)
        assert listener.of_layer(1)


@pytest.mark.parametrize("learns", [False, True])
def test_a_predictor_that_learns_is_shown_what_needs_no_hint(
    monkeypatch: pytest.MonkeyPatch, learns: bool
) -> None:
    model, inputs = families.build("mixtral")
    monkeypatch.setattr(PreviousToken, "learns", learns)
    with listening(model, "previous-token", layer_resident=lambda layer: True) as listener:
        shown: list[int] = []
        predict = listener.hooks._predictor.predict
        monkeypatch.setattr(
            listener.hooks._predictor,
            "predict",
            lambda route: shown.append(route.layer) or predict(route),
        )
        families.logits(model, inputs)
        assert not listener.hints
    assert shown == ([0, 1, 2] if learns else [])


def test_experts_of_other_machines_are_not_shown() -> None:
    """An id from num_experts up stands for an expert that another machine holds."""
    model, _ = families.build("mixtral")
    shown: list[list[int]] = []
    with listening(model, "none") as listener:
        listener.hooks.observe(lambda route: shown.append(list(route.experts())))
        listener.hooks.on_route(0, torch.tensor([[3, families.NUM_EXPERTS]]))
        listener.hooks.on_route(0, torch.tensor([[3, families.NUM_EXPERTS], [1, 3]]))
    assert shown == [[3], [3, 1]]


def test_layers_that_do_not_pay_are_only_probed() -> None:
    model, inputs = families.build("mixtral")
    token = {"input_ids": inputs["input_ids"][:1, :1]}
    paying = {2}
    with listening(model, "previous-token", worthwhile=paying.__contains__) as listener:
        for _ in range(16):
            families.logits(model, token)
        listener.hints.clear()
        for _ in range(64):
            families.logits(model, token)
        assert len(listener.of_layer(1)) == 2
        assert len(listener.of_layer(2)) == 64
        paying.add(1)
        listener.hints.clear()
        for _ in range(32):
            families.logits(model, token)
        assert len(listener.of_layer(1)) > 16


# --- threads ---


def test_eight_threads_predict_what_each_would_alone() -> None:
    model, inputs = families.build("mixtral")
    prompts = [inputs["input_ids"][:1, i : i + 3] for i in range(8)]

    everyone = threading.Barrier(len(prompts))

    def generate(prompt: torch.Tensor) -> None:
        for _ in range(3):
            families.greedy(model, {"input_ids": prompt})

    def generate_together(prompt: torch.Tensor) -> None:
        everyone.wait()
        generate(prompt)
        everyone.wait()  # nobody's thread id is given to another

    def told(listener: Listener, thread: int | None) -> list[tuple[int, list[int]]]:
        return [(layer, ids) for who, layer, ids, _ in listener.hints if who == thread]

    expected = []
    with listening(model, "next-gate") as alone:
        generate(prompts[0])  # makes the ghosts
        for prompt in prompts:
            alone.hints.clear()
            generate(prompt)
            expected.append(told(alone, threading.get_ident()))
    with listening(model, "next-gate") as together:
        threads = [threading.Thread(target=generate_together, args=(p,)) for p in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        report = together.hooks.report()
    assert report[1].startswith("next-gate") and report[2].startswith("next-gate")
    for thread, hints in zip(threads, expected, strict=True):
        # The first forwards may come before the ghosts are made; the last text never does.
        last = len(hints) // 3
        assert last > 4
        assert told(together, thread.ident)[-last:] == hints[-last:]
