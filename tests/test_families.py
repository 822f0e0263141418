"""Every family behind the experts interface, on tiny random models."""

from __future__ import annotations

from collections import Counter

import families
import pytest
import torch

TAKING_PART = [name for name in families.families() if name not in families.LEFT_OUT]


def test_enough_families_take_part() -> None:
    assert len(TAKING_PART) >= 50
    assert set(families.LEFT_OUT) <= set(families.families())
    assert all(families.LEFT_OUT.values())


@pytest.mark.parametrize("name", TAKING_PART)
def test_a_wrong_expert_shows(name: str) -> None:
    """The other tests here prove something only if each layer's experts reach the logits."""
    model, inputs = families.build(name)
    experts = families.find_experts(model)
    routes: dict[str, Counter[int]] = {path: Counter() for path in experts}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, used=routes[path]: used.update(args[1].flatten().tolist())
        )
        for path, module in experts.items()
    ]
    expected = families.logits(model, inputs)
    for hook in hooks:
        hook.remove()

    assert len(experts) >= 2
    for path, module in experts.items():
        assert len(routes[path]) >= 2, f"{path} sends every token to one expert"
        (first, _), (second, _) = routes[path].most_common(2)
        _swap(module, first, second)
        assert (families.logits(model, inputs) - expected).abs().max() > 1e-3, path
        _swap(module, first, second)


@torch.no_grad()
def _swap(module: torch.nn.Module, first: int, second: int) -> None:
    for parameter in module.parameters(recurse=False):
        parameter[[first, second]] = parameter[[second, first]]
