"""A user's mistake, found after Hydra has begun: its message and a non-zero exit status, nothing else.

Hydra would put "Error executing job with overrides: …" before a message and "Set the environment variable
HYDRA_FULL_ERROR=1 …" after it, which send a person who misspelt a name to look for a bug.  An exit passes through Hydra untouched.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from quantsweep.errors import QuantsweepError


@contextlib.contextmanager
def shown_plainly() -> Iterator[None]:
    """End the program with the message of a QuantsweepError or an OSError, on stderr, and status 1; HYDRA_FULL_ERROR=1 shows its stack."""
    try:
        yield
    except QuantsweepError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(str(error))
    except OSError as error:  # a full disk, a limit on the size of files: the surroundings, not the program
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"{error.filename or 'the launch'}: {error.strerror or error}")
