"""onnxmerge passes: the rewrites that the methods are made of."""

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors


@reports_errors
def passes(as_json: options.Json = False, verbose: options.Verbose = False) -> None:
    """List the rewrites: whether each keeps outputs equal (exact), and what `apply` must be told to make it."""
    from onnxmerge.methods.passes import list_passes

    found = list_passes()
    if as_json:
        options.print_json([vars(own) for own in found])
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("pass", "keeps outputs", "apply --set", "what it does")
    table.columns[0].no_wrap = True
    for own in found:
        settings = ["-"] if own.settings is None else [f"{n}={default}" for n, default in own.settings.items()]
        name = own.name if own.distribution == "onnxmerge" else f"{own.name}\n({own.distribution})"
        cells = [name, own.preserves or "-", "\n".join(settings), own.summary]
        table.add_row(*(Text(cell) for cell in cells))
    table.caption = "-: the methods make it, from what no --set can tell"
    Console().print(table)
