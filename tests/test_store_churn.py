"""Random rewrites, deletes and held snapshots against a dictionary."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tiered_mem.keys import BlockKey, Kind
from tiered_mem.store import Store, allocate

KEYS = [BlockKey(Kind.EXPERT, layer, index) for layer in range(2) for index in range(3)]
KEYS.append(BlockKey(Kind.KV, 0, 7))

keys = st.sampled_from(KEYS)
sizes = st.sampled_from([0, 1, 100, 4096, 70_000, 300_001, 1 << 20, (1 << 20) + 5, 2_500_000])
codecs = st.sampled_from([("none", 1), ("zstd", 1), ("zstd", 2)])
puts = st.tuples(keys, sizes, codecs, st.integers(0, 999))
changes = st.lists(st.one_of(puts, keys), min_size=1, max_size=5)


def content(key: BlockKey, nbytes: int, seed: int) -> bytes:
    # Half of it compresses, and no two blocks are alike.
    return np.random.default_rng([key.pack(), seed]).integers(0, 16, nbytes, np.uint8).tobytes()


def assert_holds(snapshot, model: dict[BlockKey, bytes]) -> None:
    assert snapshot.keys().tolist() == sorted(key.pack() for key in model)
    for key, expected in model.items():
        out = allocate(len(expected))
        snapshot.read(key, out)
        assert out.tobytes() == expected


class Churn(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "store"
        self.store = Store.open(self.path, mode="w", capacity=1 << 30)
        self.model: dict[BlockKey, bytes] = {}
        self.held: list[tuple] = []

    def teardown(self) -> None:
        for snapshot, model in self.held:
            assert_holds(snapshot, model)
        assert self.store.verify() == []
        self.store.close()
        self.folder.cleanup()

    @rule(changes=changes, abort=st.sampled_from([False, False, False, True]))
    def transact(self, changes, abort):
        model = dict(self.model)
        try:
            with self.store.transaction() as txn:
                for change in changes:
                    if isinstance(change, BlockKey):
                        assert txn.delete(change) == (change in model)
                        model.pop(change, None)
                    else:
                        key, nbytes, (codec, itemsize), seed = change
                        model[key] = content(key, nbytes, seed)
                        txn.put(key, model[key], codec=codec, itemsize=itemsize)
                if abort:
                    raise InterruptedError
        except InterruptedError:
            return
        self.model = model

    @precondition(lambda self: len(self.held) < 3)
    @rule()
    def hold(self):
        self.held.append((self.store.snapshot(), dict(self.model)))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 2))
    def let_go(self, which):
        snapshot, model = self.held.pop(which % len(self.held))
        assert_holds(snapshot, model)
        snapshot.close()

    @precondition(lambda self: not self.held)
    @rule()
    def reopen(self):
        self.store.close()
        self.store = Store.open(self.path, mode="w", capacity=1 << 30)

    @invariant()
    def latest_is_right(self):
        with self.store.snapshot() as snapshot:
            assert_holds(snapshot, self.model)


TestChurn = Churn.TestCase
TestChurn.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
