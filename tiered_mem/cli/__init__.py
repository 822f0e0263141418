"""The `tiered-mem` command. One file a command; what they do is the library's.

Exit codes: 0 done, 1 a check failed, 2 bad input or a failed operation, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import cast

import typer

from tiered_mem.cli import (
    compare,
    doctor,
    kv,
    output,
    pack,
    policies,
    run,
    trace,
    train_head,
    verify,
)
from tiered_mem.errors import TieredMemError

# Newer typer carries click's classes itself, older typer uses click's.
_UsageError = cast(type[Exception], typer.BadParameter.__bases__[0])

app = typer.Typer(
    name="tiered-mem",
    help="Run models larger than the GPU: experts over HBM, DRAM and NVMe.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    pack.pack,
    run.run,
    verify.verify,
    doctor.doctor,
    policies.policies,
    compare.compare,
):
    app.command()(command)
app.add_typer(trace.app, name="trace")
app.add_typer(kv.app, name="kv")
app.command("train-head")(train_head.train_head)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code."""
    sys.exit(invoke(sys.argv[1:] if arguments is None else arguments))


def invoke(arguments: Sequence[str]) -> int:
    """Run the command with `arguments` and return its exit code. An error is one line on stderr."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = output.show_warning
            code = app(list(arguments), prog_name="tiered-mem", standalone_mode=False) or 0
    except BrokenPipeError:
        # The reader has what it wanted. Nothing may be flushed into the pipe at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        code = 130
    except _UsageError as error:
        return _fail(_explain(error))
    except TieredMemError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(_explain_os(error))
    if code == 130:
        output.error("interrupted")
    return int(code)


def _fail(message: str) -> int:
    if message:
        output.error(f"tiered-mem: {' '.join(message.split())}")
    return 2


_ADVICE = {
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "a part of that path is a file: give another path",
    errno.EISDIR: "it is a directory: name a file",
    errno.EEXIST: "give a new name",
    errno.EACCES: "change its permissions or give another path",
    errno.EPERM: "change its permissions or give another path",
    errno.EROFS: "give a path on a file system that can be written",
    errno.ENOSPC: "make room there or give a path on another disk",
    errno.EDQUOT: "make room there or give a path on another disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free memory or give smaller budgets",
    errno.EIO: "the disk may be failing: see the system's log (dmesg)",
}


def _explain_os(error: OSError) -> str:
    """What happened, where, and what to do."""
    if error.errno is None:
        return str(error)
    where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
    advice = _ADVICE.get(error.errno, "see the system's log (dmesg)")
    return f"{where}{error.strerror or os.strerror(error.errno)}; {advice}"


def _explain(error: Exception) -> str:
    message: str = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "tiered-mem"
    # There is none when no command was given: then the help has been printed.
    return f"{message} (see {command} --help)" if message else ""
