"""One seam in transformers' `from_pretrained`, where everything is known and nothing is read.

`from_pretrained` resolves the files, settles config, dtype and quantisation, builds the model on
the meta device and its conversion mapping, and hands all of it to
`PreTrainedModel._load_pretrained_model`, which reads the tensors. `intercept_loading` puts a
handler there: whatever transformers decides about a checkpoint holds here too, by construction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Loading:
    """A load in progress: the model (on meta), where its tensors are, and how they are converted.

    `config` is transformers' LoadStateDictConfig (dtype, dtype_plan, weight_mapping, quantiser).
    """

    model: PreTrainedModel
    state_dict: dict[str, Any] | None
    files: list[str] | None
    config: Any


# Given the load and the rest of it: `resume(state_dict)` goes on, reading `state_dict` (lazy slices
# by file key) or, if that is None, all files.
Handler = Callable[[Loading, Callable[[dict[str, Any] | None], Any]], Any]

_handler: ContextVar[Handler | None] = ContextVar("tiered_mem_loading_handler", default=None)

# transformers sets process-wide state while it builds a model (torch's default dtype, patched
# initialisers), so two of our loads at once would see each other's dtype. They take turns.
_turn = threading.RLock()


@contextmanager
def intercept_loading(handler: Handler) -> Iterator[None]:
    """Call `handler` for each `from_pretrained` in this thread (and context) inside the block.

    Loads in other threads go their usual way; other threads' `intercept_loading` wait. Re-entrant:
    the innermost handler counts. The seam is put back on the way out, whatever happened.
    """
    with _turn:
        original = PreTrainedModel.__dict__["_load_pretrained_model"]
        token = _handler.set(handler)
        if not isinstance(original, _Seam):
            PreTrainedModel._load_pretrained_model = _Seam(original.__func__)
        try:
            yield
        finally:
            PreTrainedModel._load_pretrained_model = original
            _handler.reset(token)


def default_model_class(path_or_id: str, **hf_kwargs: Any) -> Any:
    """Return the class a checkpoint is loaded with: its own architecture if that can generate.

    Otherwise, and for code that comes with the checkpoint, `AutoModelForCausalLM`.
    """
    config = load_config(path_or_id, **hf_kwargs)
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        can_generate = getattr(found, "can_generate", None)
        if can_generate is not None and can_generate():
            return found
    return AutoModelForCausalLM


def load_config(path_or_id: str, **hf_kwargs: Any) -> PreTrainedConfig:
    """Return the config that `from_pretrained` with these options would start from."""
    given = hf_kwargs.get("config")
    if isinstance(given, PreTrainedConfig):
        return given
    kwargs = {k: v for k, v in hf_kwargs.items() if k in _CONFIG_KWARGS}
    return AutoConfig.from_pretrained(given or path_or_id, **kwargs)


# Of from_pretrained's options, those that say where the config is.
_CONFIG_KWARGS = {
    *("cache_dir", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token", "trust_remote_code"),
}


class _Seam(staticmethod):  # type: ignore[type-arg]
    """The static method that asks the handler of the calling context, if there is one."""

    def __init__(self, original: Callable[..., Any]) -> None:
        def load(
            model: PreTrainedModel,
            state_dict: dict[str, Any] | None,
            files: list[str] | None,
            config: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            handler = _handler.get()
            if handler is None:
                return original(model, state_dict, files, config, *args, **kwargs)

            def resume(state_dict: dict[str, Any] | None) -> Any:
                return original(model, state_dict, files, config, *args, **kwargs)

            return handler(Loading(model, state_dict, files, config), resume)

        super().__init__(load)
