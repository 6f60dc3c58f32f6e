"""What the scripts call: python3 fast_dllm/runner/__main__.py SCRIPT PROJECT_ROOT COMMAND [OPTION...]

SCRIPT names the caller in an error's line. Any Python from 3.8 on; run by its path, so that the code is that of this
file's folder: a job's is a snapshot, which stands in another folder than the one that the job runs in.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from fast_dllm.errors import UsageError, show_any_character
from fast_dllm.runner.commands import main

if __name__ == "__main__":
    show_any_character()
    try:
        sys.exit(main(*sys.argv[1:]))
    except UsageError as error:
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
