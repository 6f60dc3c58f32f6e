"""A guard around every program: wrong input gives one line and exit status 2, never a traceback.

    from fast_dllm.guard import one_line
    # isort: split
    import torch ...                      # packages that only the project's environment has

    with one_line():
        main()

Import it before those packages: if they are missing, it ends the program with a line that says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from fast_dllm.errors import DataError, NonFiniteError, TakenOverError, UsageError, line_of, show_any_character

INTERRUPTED = 130  # as a shell has it: 128 + SIGINT
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
ROOT = Path(__file__).resolve().parent.parent


def program() -> str:
    """The program's name as its user knows it: app.py, or fast_dllm.report for one that is run with -m."""
    path = Path(sys.argv[0] or "python")
    if path.name == "__main__.py":
        path = path.parent
    return f"fast_dllm.{path.stem}" if path.parent.name == "fast_dllm" else path.name


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """End the program with one line: 2 for a UsageError, 1 for other errors, 130 for Ctrl-C, 0 for a closed pipe.

    An unexpected error keeps its traceback; a last line names the file of the project in which it was raised.
    """
    show_any_character()
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
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            sys.exit(f"{program()}: {line_of(error)}; free some space and run it again: what was finished is kept")
        traceback.print_exc()
        sys.exit(f"{program()}: {place_of(error)}: {type(error).__name__}: {line_of(error)}")


def place_of(error: BaseException) -> str:
    """`file, line` of the project's code that raised an error; if a policy was running, the line of the policy."""
    frames = traceback.extract_tb(error.__traceback__)
    of_project = [each for each in frames if _is_of_project(Path(each.filename))]
    policies = [each for each in frames if Path(each.filename).name == "generation_functions.py"]
    for frame in reversed(policies or of_project or frames):
        path = Path(frame.filename)
        return f"{path.relative_to(ROOT) if _is_of_project(path) else path}, line {frame.lineno}"
    return "unknown place"


def _is_of_project(path: Path) -> bool:
    """Whether a file belongs to the project; a venv inside the project's folder does not."""
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def check_folder(option: str, folder: Path) -> None:
    """Raises UsageError if the folder, which need not exist yet, cannot be written to. Leaves nothing behind."""
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
