"""What the scripts in sbatch/ start: python3 fast_dllm/runner COMMAND [OPTION...]

Any Python from 3.8 on, without a venv. It is run by its path, so that the code is that of this file's folder: a job
runs a snapshot of the code, in the project's folder.
"""

import errno
import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from fast_dllm.errors import UsageError, line_of, show_any_character
from fast_dllm.runner.command_line import COMMANDS

# What a folder answers that is read-only, of somebody else, or in fact a file
REFUSALS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR)


def main(command: str, *words: str) -> int:
    """Run one script's command; returns its exit status: 2 after one line for wrong input."""
    script, function = COMMANDS[command]
    try:
        return function(list(words))
    except UsageError as error:
        print(f"{script}: {line_of(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has what it wanted: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in REFUSALS or not error.filename:
            raise
        print(f"{script}: cannot use {str(error.filename)!r}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    show_any_character()
    sys.exit(main(*sys.argv[1:]))
