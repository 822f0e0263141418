"""The committed model and the script that trained it."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "benchmarks" / "models" / "tiny-moe"


@pytest.fixture
def train_model(monkeypatch) -> Callable[[list[str]], None]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("train_model").main


@pytest.fixture(scope="module")
def model() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((MODEL / "metrics.json").read_text())


def test_is_the_model_that_its_metrics_describe(model, metrics):
    shape = metrics["model"]
    assert model.dtype == torch.bfloat16
    assert shape["parameters"] == sum(p.numel() for p in model.parameters())
    assert shape["num_layers"] == model.config.num_hidden_layers == len(metrics["experts"])
    assert shape["num_experts"] == model.config.num_experts
    assert shape["num_experts_per_token"] == model.config.num_experts_per_tok
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 10e6


def test_learned_more_than_word_frequencies(metrics):
    validation = metrics["validation"]
    assert validation["loss"] < validation["unigram_loss"] - 1.5
    assert all(loss < validation["unigram_loss"] for loss in validation["loss_by_source"].values())


def test_every_layer_uses_its_experts_and_follows_the_text(metrics):
    for layer in metrics["experts"]:
        assert layer["entropy"] > 0.85
        assert layer["min_share"] > 0
        assert layer["repeat"] > layer["repeat_by_chance"]


def test_prefers_english_to_the_same_words_shuffled(model, tokenizer):
    text = "And it came to pass, that the king went forth into the land of his fathers."
    words = text.split()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()

    def loss(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        return model(ids, labels=ids).loss.item()

    assert loss(text) < loss(" ".join(words[i] for i in order)) - 1


@pytest.mark.parametrize("prompt", ["To be, or not to be", "In the beginning"])
def test_greedy_text_does_not_loop(model, tokenizer, prompt):
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    fours = [tuple(output[i : i + 4].tolist()) for i in range(len(output) - 3)]
    assert len(set(fours)) > 0.8 * len(fours)


def test_trains_in_seconds_on_a_file_of_your_own(train_model, tmp_path, capsys):
    train_model(["--smoke", "--text", str(ROOT / "LICENSE"), "--json", str(tmp_path / "m.json")])
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["training"]["steps"] == 8
    assert metrics["validation"]["loss"] < math.log(metrics["model"]["vocab_size"])
    assert len(metrics["experts"]) == metrics["model"]["num_layers"]
    assert "unigram" in capsys.readouterr().out


def test_names_the_fault_in_bad_arguments(train_model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_model([])
    assert "--smoke" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit):
        train_model(["--smoke", "--text", str(tmp_path / "empty.txt")])
    assert "no text found in 'empty.txt'" in capsys.readouterr().err
