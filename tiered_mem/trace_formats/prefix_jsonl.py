"""KV prefix chains of served requests: one JSON object a request.

`hash_ids` are the request's blocks in the order of its prompt; equal ids are equal prefixes, so a
block can be reused only if all before it are. Two public sets have this form:
- Mooncake: timestamp (ms), input_length, output_length, hash_ids of 512 tokens each.
  Source: https://github.com/kvcache-ai/Mooncake, FAST '25.
- Bailian: chat_id, parent_chat_id (-1 for the first of a chat), timestamp (s), input_length,
  output_length, type, turn, hash_ids of 16 tokens each.
  Source: https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon, USENIX ATC '25.
"""

from __future__ import annotations

import numpy as np

from tiered_mem.keys import KeyArray, Kind
from tiered_mem.trace import Form, Phase, Trace, TraceHeader
from tiered_mem.trace_formats.source import Record, Source

# A Llama-3-8B in 16 bits: keys and values x 32 layers x 8 heads x 128 x 2 bytes.
DEFAULT_TOKEN_NBYTES = 2 * 32 * 8 * 128 * 2


def recognise_mooncake(start: bytes) -> bool:
    return start.startswith(b"{") and b'"hash_ids"' in start and b'"chat_id"' not in start


def recognise_bailian(start: bytes) -> bool:
    return start.startswith(b"{") and b'"chat_id"' in start


def read_mooncake(source: Source, *, token_nbytes: int = DEFAULT_TOKEN_NBYTES) -> Trace:
    """Return the trace, every request a sequence of its own. Raises `TraceError`."""
    return _read(source, 512, token_nbytes, chats=False)


def read_bailian(source: Source, *, token_nbytes: int = DEFAULT_TOKEN_NBYTES) -> Trace:
    """Return the trace, every chat a sequence. Raises `TraceError`."""
    return _read(source, 16, token_nbytes, chats=True)


def _read(source: Source, block_num_tokens: int, token_nbytes: int, *, chats: bool) -> Trace:
    blocks: list[int] = []
    lengths: list[int] = []
    sequences: list[int] = []
    sequence_of: dict[int, int] = {}
    for number, record in enumerate(source.records()):
        record.number("timestamp")
        record.whole("input_length")
        record.whole("output_length")
        chain = record.whole_list("hash_ids", (1 << 64) - 1)
        blocks += chain
        lengths.append(len(chain))
        sequences.append(_chat(record, sequence_of) if chats else number)
    if not blocks:
        raise source.error("no request has a block")
    num_empty = lengths.count(0)
    header = TraceHeader(
        Form.PREFIX,
        source=source.path.name,
        block_num_tokens=block_num_tokens,
        note=f"{token_nbytes} bytes a token"
        + (f"; {num_empty} requests without a block left out" if num_empty else ""),
    )
    return Trace.from_rows(
        header,
        step=np.repeat(np.arange(len(lengths)), lengths),
        kind=Kind.KV,
        index=number_blocks(np.array(blocks, np.uint64)),
        phase=Phase.PREFILL,
        sequence=np.repeat(np.array(sequences), lengths),
        nbytes=block_num_tokens * token_nbytes,
        name=source.name,
    )


def _chat(record: Record, sequence_of: dict[int, int]) -> int:
    """The chat that a request belongs to, with all its parents: the line of the first of them."""
    chat = record.whole("chat_id", highest=(1 << 63) - 1)
    parent = record.whole("parent_chat_id", lowest=-1, highest=(1 << 63) - 1)
    # A parent that isn't in the file began before it: then this chat begins here.
    sequence_of[chat] = sequence_of.get(parent, record.line)
    return sequence_of[chat]


def number_blocks(ids: KeyArray) -> KeyArray:
    """Return ids that fit a key's 32 bits: as they are, else numbered as they first appear."""
    if int(ids.max()) < 1 << 32:
        return ids
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), np.uint64)
    numbers[np.argsort(first)] = np.arange(len(first), dtype=np.uint64)
    return numbers[inverse]
