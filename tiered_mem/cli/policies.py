"""`tiered-mem policies`: what there is to choose from."""

from __future__ import annotations

from tiered_mem.cli import output


def policies(as_json: output.JsonOption = False) -> None:
    """List eviction policies and predictors, plug-ins too: name, what it does, where it is from.

    A plug-in that can't be used is listed with what is wrong with it.
    """
    from tiered_mem import _core, plugins
    from tiered_mem.policies import prefetch

    fields = ("name", "summary", "source")
    others = plugins.list_plugins()
    built_in = {"eviction": _core.eviction_policies(), "prefetch": prefetch.list_predictors()}
    found = {
        kind: [*rows, *((p.name, p.summary, p.source) for p in others if p.kind == kind)]
        for kind, rows in built_in.items()
    }
    broken = [(p.name, p.error, p.source) for p in others if p.error]
    if as_json:
        output.print_json(
            {
                kind: [dict(zip(fields, row, strict=True)) for row in rows]
                for kind, rows in found.items()
            }
            | {
                "broken": [
                    dict(zip(("name", "error", "source"), row, strict=True)) for row in broken
                ]
            }
        )
        return
    for kind, rows in found.items():
        output.print_table(rows, title=f"--{kind}")
    if broken:
        output.print_table(broken, title="plug-ins that can't be used")
