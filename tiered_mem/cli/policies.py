"""`tiered-mem policies`: what there is to choose from."""

from __future__ import annotations

from tiered_mem.cli import output


def policies(as_json: output.JsonOption = False) -> None:
    """List eviction policies and predictors: name, what it does, where it is from."""
    from tiered_mem import _core
    from tiered_mem.policies import prefetch

    fields = ("name", "summary", "source")
    found = {"eviction": _core.eviction_policies(), "prefetch": prefetch.list_predictors()}
    if as_json:
        output.print_json(
            {
                kind: [dict(zip(fields, row, strict=True)) for row in rows]
                for kind, rows in found.items()
            }
        )
        return
    for kind, rows in found.items():
        output.print_table(rows, title=f"--{kind}")
