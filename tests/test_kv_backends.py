"""KV blocks on every backend: made in device memory, evicted, read back, with the stock tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter import in_threads
from driver_double import run_python
from test_backends import ON_DOUBLE, backend, is_shared  # noqa: F401  (a fixture)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tiered_mem
from tiered_mem import Runtime
from tiered_mem.hf import kv
from tiered_mem.kv_space import KvSpace
from tiered_mem.store import Store

NBYTES = 8192
BLOCK_TOKENS, BUDGET = 8, 8192  # a block of the model takes a page


@pytest.mark.skipif(ON_DOUBLE, reason="this is that process")
@pytest.mark.parametrize(
    "settings", ["max_delay_us=200", pytest.param("integrated=1", marks=pytest.mark.slow)]
)
def test_kv_blocks_on_a_double_of_cudas_driver(cuda_double: Path, settings: str) -> None:
    code = (
        "import sys, pytest;"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {__file__!r}, '-k', 'cuda']))"
    )
    run_python(cuda_double, code, settings, timeout=240)


@pytest.fixture(params=["nvme", "dram"])
def space(request: pytest.FixtureRequest, backend: Any, tmp_path: Path) -> Iterator[KvSpace]:  # noqa: F811
    dram = 0 if request.param == "nvme" else 6 * NBYTES
    if dram and is_shared(backend):
        pytest.skip("memory that is shared has no DRAM tier")
    with (
        Store.open(tmp_path, mode="w", durable=False) as store,
        Runtime(4 * NBYTES, dram, eviction="lru", device=backend) as runtime,
    ):
        made = runtime.attach_kv(store)
        made.add_layer(0, NBYTES)
        made.add_layer(1, NBYTES)
        yield made


def content(number: int) -> torch.Tensor:
    drawn = np.random.default_rng(number).integers(0, 256, NBYTES, np.uint8)
    return torch.from_numpy(drawn)


def make(space: KvSpace, layer: int, numbers: list[int]) -> list[int]:
    return space.create(layer, [content(n).to(space.backend.device) for n in numbers])


def check(space: KvSpace, layer: int, numbers: dict[int, int], indices: list[int]) -> None:
    """Read the blocks; `numbers` tells by index what is in them."""
    with space.begin(layer, indices) as reading:
        left = len(indices)
        for position, slot in reading:
            assert torch.equal(space.view(slot, NBYTES).cpu(), content(numbers[indices[position]]))
            left -= 1
    assert left == 0


def test_blocks_that_were_made_come_back_from_every_tier(space: KvSpace) -> None:
    rng = np.random.default_rng(0)
    kept: list[dict[int, int]] = [{}, {}]
    for step in range(60):
        layer = int(rng.integers(2))
        numbers = [10 * step + i for i in range(int(rng.integers(1, 7)))]
        made = make(space, layer, numbers)
        kept[layer].update(zip(made, numbers, strict=True))
        chosen = rng.permutation(list(kept[layer]))[:5].tolist()
        check(space, layer, kept[layer], chosen)
        if len(kept[layer]) > 12:
            space.release(layer, chosen)
            for index in chosen:
                del kept[layer][index]
    for layer, numbers_by_index in enumerate(kept):
        check(space, layer, numbers_by_index, list(numbers_by_index))
    stats = space.runtime.stats()
    assert stats.num_nvme_reads > 0
    assert space.runtime.nbytes_used()["hbm"] <= 4 * NBYTES


def test_threads_make_read_and_forget(space: KvSpace) -> None:
    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for step in range(8):
            numbers = [1000 * seed + 10 * step + i for i in range(int(rng.integers(1, 4)))]
            indices = make(space, seed % 2, numbers)
            check(space, seed % 2, dict(zip(indices, numbers, strict=True)), indices)
            space.release(seed % 2, indices)

    assert in_threads([lambda seed=seed: work(seed) for seed in range(3)]) == [None] * 3
    assert space.num_blocks == 0
    assert space.runtime.nbytes_used() == {"hbm": 0, "dram": 0}


def test_hbm_is_resized_between_steps(space: KvSpace) -> None:
    numbers = {}
    # Where blocks are read in place, HBM grows no further than at the start.
    for slots in (4, 1, 2) if space.backend.in_place else (12, 1, 5, 2):
        made = [slots * 100 + i for i in range(4)]
        numbers.update(zip(make(space, 0, made), made, strict=True))
        space.runtime.resize(hbm=slots * NBYTES)
        check(space, 0, numbers, list(numbers))


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("way", ["greedy", "beams", "chunks"])
def test_generate_gives_the_stock_tokens(
    stock: PreTrainedModel,
    backend: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    options: dict[str, Any] = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "chunks": {"prefill_chunk_size": 7},
    }[way]
    device = backend.device
    tokens = torch.randint(2, 64, (2, 33), generator=torch.Generator().manual_seed(3)).to(device)
    options |= {"max_new_tokens": 20, "do_sample": False, "attention_mask": tokens > 0}
    model = copy.deepcopy(stock).to(device)
    wanted = model.generate(tokens, **options)
    monkeypatch.setattr(kv, "usable", lambda _: backend)
    tiered_mem.tier_kv(model, BUDGET, block_tokens=BLOCK_TOKENS)
    try:
        assert torch.equal(model.generate(tokens, **options), wanted)
        assert model.tiered_mem.stats().num_nvme_reads > 0
        assert model.tiered_mem.space.num_blocks == 0
    finally:
        model.tiered_mem.close()
