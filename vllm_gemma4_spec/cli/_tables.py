"""Tables that stay readable where there is little room."""

from __future__ import annotations

from vllm_gemma4_spec.cli import _rich as rich


def show(console: rich.Console, table: rich.Table) -> None:
    """Print ``table``, or, where even its longest words do not fit beside each other, row after row as lines."""
    unlimited = console.options.update(width=10_000)
    if console.measure(table, options=unlimited).minimum <= console.width:
        console.print(table)
        return
    if table.title:
        console.print(table.title, style="table.title")
    headers = [str(column.header) for column in table.columns]
    for first, *rest in zip(*(column.cells for column in table.columns), strict=True):
        console.print(f"{headers[0]} {first}", style="bold", soft_wrap=True, highlight=False)
        for header, cell in zip(headers[1:], rest, strict=True):
            if cell:
                console.print(f"  {header}: {cell}", soft_wrap=True, highlight=False)
