"""Commands on damaged files, in a process of their own: what each ended with.

Run as a program with the name of a file, it works through the requests there, one JSON list of arguments a line, and
prints one line of JSON before and one after each. A crash or a hang ends the program before its last line.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

SECONDS = 60
"""Time limit of one command."""


def main(requests: str) -> None:
    from typer.testing import CliRunner

    from onnxmerge.cli.app import app

    for line in Path(requests).read_text().splitlines():
        arguments = json.loads(line)
        print(json.dumps({"arguments": arguments}), flush=True)
        signal.alarm(SECONDS)  # ends the program
        ended = CliRunner().invoke(app, arguments)
        signal.alarm(0)
        fault = None
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            fault = "".join(traceback.format_exception(ended.exception))
        answer = {"arguments": arguments, "code": ended.exit_code, "said": ended.stderr, "fault": fault}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what onnxruntime says on its own
    main(sys.argv[1])
