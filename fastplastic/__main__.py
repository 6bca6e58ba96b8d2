"""Run the command line, as `python -m fastplastic` and as the program `fastplastic`."""

import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the program, and answer Ctrl-C from the first moment on."""
    from fastplastic.cli.interrupts import TEXT, SignalWatch
    from fastplastic.cli.launch import is_first

    watch = SignalWatch()
    try:
        from fastplastic.cli.main import main

        code = main()
    except KeyboardInterrupt:  # while it is loading, or has ended
        if is_first():
            print(TEXT, file=sys.stderr)
        code = 130
    watch.leave(code)


if __name__ == "__main__":
    run()
