"""Predictors of other packages, and what becomes of a model when one misbehaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from adapter import Saved, generate, prompt
from tiered_mem.policies.prefetch import Decision, Predictor, Route, make_predictor

from tiered_mem import plugins
from tiered_mem.cli import invoke
from tiered_mem.errors import ConfigError, PolicyError
from tiered_mem.policy import EvictionPolicy

DECISION = Decision(layer=0, next_layer=1, ids=[1, 2], num_experts=8, top_k=2)
PREDICTOR = """
    from tiered_mem.policies.prefetch import Predictor

    class Guess(Predictor):
        '''Always the same one.

        More of it.
        '''

        name = "guess"

        @classmethod
        def from_arguments(cls, arguments):
            made = cls()
            made.answer = [int(text) for text in arguments]
            return made

        def predict(self, route):
            return self.answer
"""
Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package of one module with entry points; returns the module's name."""
    monkeypatch.syspath_prepend(tmp_path)
    modules: list[str] = []

    def install(package: str, source: str, **entry_points: str) -> str:
        module = f"{package.replace('-', '_')}_of_a_test"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(dedent(source))
        info = tmp_path / f"{package}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        lines = [f"{name.replace('_', '-')} = {module}:{at}" for name, at in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{plugins.GROUP}]", *lines, ""]))
        return module

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def test_a_predictor_of_another_package_is_made_by_name(install: Install) -> None:
    module = install("guesswork", PREDICTOR, my_guess="Guess")
    assert plugins.names() == ["my-guess"]
    made = make_predictor("my-guess(3,4)")
    assert made.predict(DECISION) == [3, 4]
    assert module in sys.modules


def test_nothing_is_imported_before_its_name_is_asked_for(install: Install) -> None:
    module = install("guesswork", PREDICTOR, my_guess="Guess")
    make_predictor("next-gate")
    with pytest.raises(ConfigError, match=r"choose one of eam, .*, my-guess, next-gate"):
        make_predictor("my-guesses")
    assert module not in sys.modules


def test_its_answers_are_checked_in_its_name(install: Install) -> None:
    install("guesswork", PREDICTOR, my_guess="Guess")
    who = r"plug-in 'my-guess' \(guesswork_of_a_test:Guess, of guesswork 1\.5\)"
    with pytest.raises(PolicyError, match=who + r" predicted \[8\] .* experts are 0 to 7"):
        make_predictor("my-guess(8)").predict(DECISION)
    with pytest.raises(PolicyError, match=who + " raised ValueError.* when it was made"):
        make_predictor("my-guess(x)")


def test_one_that_makes_something_else_is_refused(install: Install) -> None:
    install("guesswork", PREDICTOR.replace("return made", "return arguments"), my_guess="Guess")
    with pytest.raises(PolicyError, match=r"'my-guess' .* made \['3'\], which is no Predictor"):
        make_predictor("my-guess(3)")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nothing_of_that_name", "can't be imported: ModuleNotFoundError"),
        ("raise OSError('no disk')", r"can't be imported: OSError\('no disk'\)"),
        ("Other = 1", "can't be imported: AttributeError"),
        ("Guess = 7", "is 7, not a class derived from"),
        ("class Guess: pass", "not a class derived from"),
        ("def Guess(): pass", "not a class derived from"),
    ],
)
def test_one_that_cannot_be_used_is_refused_by_name(
    install: Install, source: str, says: str
) -> None:
    install("guesswork", source, broken="Guess")
    with pytest.raises(PolicyError, match=rf"plug-in 'broken' .*guesswork 1\.5.* {says}"):
        make_predictor("broken")


def test_built_ins_keep_their_names(install: Install) -> None:
    module = install("guesswork", PREDICTOR, transition="Guess", lru="Guess")
    assert make_predictor("transition").__class__.__name__ == "Transition"
    for name in ("transition", "lru"):
        with pytest.raises(PolicyError, match=f"plug-in '{name}' .* has the name of a built-in"):
            plugins.load(name, "prefetch")
    assert module not in sys.modules


def test_a_name_that_two_packages_have_is_refused(install: Install) -> None:
    install("guesswork", PREDICTOR, my_guess="Guess")
    install("legwork", PREDICTOR, my_guess="Guess")
    with pytest.raises(ConfigError, match=r"guesswork 1\.5.* and .*legwork 1\.5.* the same name"):
        make_predictor("my-guess")


def test_an_eviction_policy_is_no_predictor(install: Install) -> None:
    install(
        "stays",
        "from tiered_mem.policy import EvictionPolicy\nclass Stay(EvictionPolicy): 'It stays.'",
        stay="Stay",
    )
    assert issubclass(plugins.load("stay", "eviction"), EvictionPolicy)
    with pytest.raises(
        ConfigError, match=r"plug-in 'stay' .* is for --eviction, not for --prefetch"
    ):
        make_predictor("stay")
    assert plugins.list_plugins() == [
        plugins.PluginInfo("stay", "eviction", "It stays.", "stays 1.5")
    ]


def test_the_command_lists_them_and_what_is_wrong(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("guesswork", PREDICTOR, my_guess="Guess")
    install("rubble", "1 / 0", rubble="Guess", arc_like="Guess")
    assert invoke(["policies", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["prefetch"][-1] == {
        "name": "my-guess",
        "summary": "Always the same one.",
        "source": "guesswork 1.5",
    }
    assert [row["name"] for row in listed["broken"]] == ["arc-like", "rubble"]
    assert all("ZeroDivisionError" in row["error"] for row in listed["broken"])
    assert invoke(["policies"]) == 0
    printed = capsys.readouterr().out
    assert "my-guess" in printed and "ZeroDivisionError" in printed and "rubble 1.5" in printed


# --- in a running model ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved.make("mixtral", tmp_path_factory.mktemp("mixtral"))


class Moody(Predictor):
    """Predicts well for a while, then what it was told to."""

    name = "moody"

    def __init__(self, answer: Callable[[Route], Sequence[int]], after: int) -> None:
        self._answer, self.num_left = answer, after

    def predict(self, route: Route) -> Sequence[int]:
        self.num_left -= 1
        return route.experts() if self.num_left >= 0 else self._answer(route)


def fail(route: Route) -> Sequence[int]:
    raise RuntimeError("in a bad mood")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (fail, "raised RuntimeError.'in a bad mood'"),
        (lambda route: [route.num_experts], "experts are 0 to"),
        (lambda route: [0, 0], "some are named twice"),
        (lambda route: [-1], "experts are 0 to"),
        (lambda route: ["all"], "a sequence of integers is wanted"),
    ],
)
@pytest.mark.parametrize("after", [0, 7])
def test_a_model_survives_a_predictor_that_misbehaves(
    saved: Saved, answer: Callable[[Route], Sequence[int]], says: str, after: int
) -> None:
    expected = generate(saved.model, prompt())
    predictor = Moody(answer, after)
    with saved.on_tiers(prefetch=predictor) as model:
        with pytest.raises(PolicyError, match=rf"predictor 'Moody' .*{says}"):
            generate(model, prompt())
        # Nothing is pinned or lost: prompts that need every slot, in waves, go on as ever.
        predictor.num_left = 1 << 30
        for _ in range(2):
            assert torch.equal(generate(model, prompt()), expected)


def test_a_plugin_runs_in_a_model(saved: Saved, install: Install) -> None:
    install("guesswork", PREDICTOR, my_guess="Guess")
    with saved.on_tiers(prefetch="my-guess(1,2)") as model:
        assert torch.equal(generate(model, prompt()), generate(saved.model, prompt()))
        assert model.tiered_mem.stats().num_hints > 0
        assert model.tiered_mem.prefetch == "guess"
