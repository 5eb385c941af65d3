"""onnxmerge passes: the rewrites that the methods are made of."""

from onnxmerge.cli import options
from onnxmerge.cli.errors import reports_errors


@reports_errors
def passes(as_json: options.Json = False, verbose: options.Verbose = False) -> None:
    """List the rewrites that the methods are made of, and whether each keeps outputs equal (exact)."""
    from onnxmerge.methods.passes import list_passes

    found = list_passes()
    if as_json:
        options.print_json([vars(own) for own in found])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("pass", "keeps outputs", "what it does")
    for own in found:
        table.add_row(own.name, own.preserves, own.summary)
    Console().print(table)
