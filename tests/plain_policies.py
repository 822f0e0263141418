"""Policies with segments, queues and counts, written for clarity: misses among keys of equal size.

Ordered dicts hold the oldest first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

Queue = OrderedDict[int, None]
Keys = Sequence[int]


def pop_oldest(queue: Queue) -> int:
    return queue.popitem(last=False)[0]


def slru(keys: Keys, num_slots: int) -> int:
    segments: list[Queue] = [OrderedDict() for _ in range(4)]
    room, misses = num_slots // 4, 0
    for key in keys:
        level = next((i for i, segment in enumerate(segments) if key in segment), None)
        if level is None:
            misses += 1
            if sum(map(len, segments)) == num_slots:
                pop_oldest(next(segment for segment in segments if segment))
            level = next((i for i, segment in enumerate(segments) if len(segment) < room), 0)
            segments[level][key] = None
            continue
        del segments[level][key]
        level = min(level + 1, 3)
        segments[level][key] = None
        for above in range(level, 0, -1):
            while len(segments[above]) > room:
                segments[above - 1][pop_oldest(segments[above])] = None
    return misses


def two_q(keys: Keys, num_slots: int) -> int:
    newcomers, main, ghosts, misses = Queue(), Queue(), Queue(), 0
    for key in keys:
        if key in main:
            main.move_to_end(key)
        elif key not in newcomers:
            misses += 1
            if len(newcomers) + len(main) == num_slots:
                if len(newcomers) > num_slots // 4 or not main:
                    ghosts[pop_oldest(newcomers)] = None
                else:
                    pop_oldest(main)
            (main if key in ghosts else newcomers)[key] = None
            ghosts.pop(key, None)
            while len(ghosts) > num_slots // 2:
                pop_oldest(ghosts)
    return misses


def s3_fifo(keys: Keys, num_slots: int) -> int:
    small, main, ghosts, uses, misses, full = Queue(), Queue(), Queue(), Counter[int](), 0, False
    share = num_slots // 10

    def evict() -> None:
        main_first = len(main) > num_slots - share
        while small and not main_first:
            key = pop_oldest(small)
            if uses[key] < 2:
                ghosts[key] = None
                return
            uses[key] = 0
            main[key] = None
        while uses[next(iter(main))] > 0:
            key = pop_oldest(main)
            uses[key] -= 1
            main[key] = None
        pop_oldest(main)

    for key in keys:
        if key in small or key in main:
            uses[key] = min(uses[key] + 1, 3)
            continue
        misses += 1
        if len(small) + len(main) == num_slots:
            evict()
            full = True
        to_main = key in ghosts or (not full and len(small) >= share)
        (main if to_main else small)[key] = None
        uses[key] = 0
        ghosts.pop(key, None)
        while len(ghosts) > num_slots * 9 // 10:
            pop_oldest(ghosts)
    return misses


def lirs(keys: Keys, num_slots: int) -> int:
    stack, queue, ghosts, lir, misses = Queue(), Queue(), Queue(), set[int](), 0
    room = num_slots - max(num_slots // 100, 1)

    def push(key: int, as_lir: bool) -> None:
        stack[key] = None
        stack.move_to_end(key)
        if as_lir:
            lir.add(key)
        prune()
        while len(lir) > room:
            oldest = pop_oldest(stack)
            lir.remove(oldest)
            queue[oldest] = None
            prune()

    def prune() -> None:
        while stack and next(iter(stack)) not in lir:
            ghosts.pop(pop_oldest(stack), None)

    for key in keys:
        if key in lir:
            push(key, True)
        elif key in queue:
            near = key in stack
            if near:
                del queue[key]
            else:
                queue.move_to_end(key)
            push(key, near)
        else:
            misses += 1
            if len(lir) + len(queue) == num_slots:
                victim = pop_oldest(queue)
                if victim in stack:
                    ghosts[victim] = None
            as_lir = key in ghosts or len(lir) < room
            ghosts.pop(key, None)
            if not as_lir:
                queue[key] = None
            push(key, as_lir)
        while len(stack) > 2 * num_slots and ghosts:
            del stack[pop_oldest(ghosts)]
    return misses


def lfu(keys: Keys, num_slots: int, aging: bool = True) -> int:
    uses, rank, age, misses = Counter[int](), dict[int, tuple[int, int]](), 0, 0
    for now, key in enumerate(keys):
        if key not in rank:
            misses += 1
            if len(rank) == num_slots:
                victim = min(rank, key=rank.__getitem__)
                age = aging * rank[victim][0]
                del rank[victim], uses[victim]
        uses[key] += 1
        rank[key] = uses[key] + age, now
    return misses


def w_tiny_lfu(keys: Keys, num_slots: int) -> int:
    """With exact counts: the policy's sketch may mistake a few."""
    window, probation, protected, misses = Queue(), Queue(), Queue(), 0
    room = max(num_slots // 100, 1)
    counts, num_uses = Counter[int](), 0

    def count(key: int) -> None:
        nonlocal counts, num_uses
        counts[key] = min(counts[key] + 1, 15)
        num_uses += 1
        if num_uses >= 10 * min(num_slots, len(window) + len(probation) + len(protected)):
            counts = Counter({key: uses // 2 for key, uses in counts.items()})
            num_uses //= 2

    for key in keys:
        if key in window:
            window.move_to_end(key)
        elif key in probation or key in protected:
            probation.pop(key, None)
            protected[key] = None
            protected.move_to_end(key)
            while len(protected) > (num_slots - len(window)) * 4 // 5:
                probation[pop_oldest(protected)] = None
        else:
            misses += 1
            if len(window) + len(probation) + len(protected) == num_slots:
                candidate, main = pop_oldest(window), probation or protected
                if main and counts[candidate] > counts[next(iter(main))]:
                    pop_oldest(main)
                    probation[candidate] = None
            window[key] = None
            while len(window) > room:
                probation[pop_oldest(window)] = None
        count(key)
    return misses


def w_tiny_lfu_of_libcachesim(keys: Keys, num_slots: int) -> int:
    """Its variant, before the first halving, of a multiple of 500 slots."""
    window, probation, protected, misses = Queue(), Queue(), Queue(), 0
    num_main = num_slots - num_slots // 100
    counts = Counter[int]()

    def enter_main(key: int) -> None:
        (probation if len(probation) < num_main // 5 else protected)[key] = None

    for key in keys:
        if key in window:
            window.move_to_end(key)
            continue
        counts[key] += 1
        if key in probation or key in protected:
            probation.pop(key, None)
            protected[key] = None
            protected.move_to_end(key)
            while len(protected) > num_main * 4 // 5:
                probation[pop_oldest(protected)] = None
            continue
        misses += 1
        while len(window) + len(probation) + len(protected) == num_slots:
            candidate = pop_oldest(window)
            if len(probation) + len(protected) < num_main:
                enter_main(candidate)
            elif counts[candidate] > counts[next(iter(probation))]:
                pop_oldest(probation)
                enter_main(candidate)
            counts[candidate] += 1
        window[key] = None
    return misses


PLAIN: dict[str, Callable[[Keys, int], int]] = {
    "slru": slru,
    "2q": two_q,
    "s3-fifo": s3_fifo,
    "lirs": lirs,
    "lfu": lfu,
    "w-tinylfu": w_tiny_lfu,
}
