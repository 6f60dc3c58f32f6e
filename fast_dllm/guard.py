"""One guard for every program: what is wrong with the input is one line and exit status 2, never a traceback.

    from fast_dllm.guard import one_line
    # isort: split
    import torch ...                      # whatever only the project's environment holds

    with one_line():
        main()

It is imported before those others, because importing it says what to do where they are missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fast_dllm.errors import DataError, NonFiniteError, TakenOverError, UsageError, line_of

INTERRUPTED = 130  # as a shell has it: 128 + SIGINT


def program() -> str:
    """The program's name as its user knows it: app.py, or fast_dllm.report for one that is run with -m."""
    path = Path(sys.argv[0] or "python")
    if path.name == "__main__.py":
        path = path.parent
    return f"fast_dllm.{path.stem}" if path.parent.name == "fast_dllm" else path.name


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """End with one line: 2 for a UsageError, 1 where the run cannot go on, 130 for Ctrl-C, 0 for a closed pipe."""
    try:
        yield
    except UsageError as error:
        print(f"{program()}: error: {line_of(error)}", file=sys.stderr)
        sys.exit(2)
    except (DataError, NonFiniteError, TakenOverError) as error:
        sys.exit(f"{program()}: {line_of(error)}")
    except KeyboardInterrupt:
        print(f"{program()}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader has what it wanted: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush complains again
        sys.exit(0)


def check_folder(option: str, folder: Path) -> None:
    """Raises UsageError where nothing can be written into the folder, which need not be there; leaves no trace."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise UsageError(f"{option}: cannot write into {str(folder)!r}: {error.strerror}") from None
    finally:
        for remove in (probe.unlink, *(path.rmdir for path in missing)):
            with contextlib.suppress(OSError):
                remove()


if importlib.util.find_spec("torch") is None:
    print(
        f"{program()}: error: {sys.executable} is not the project's environment; "
        'source "$(bash sbatch/venv.sh)/bin/activate" makes it where it is missing, and enters it',
        file=sys.stderr,
    )
    sys.exit(2)
