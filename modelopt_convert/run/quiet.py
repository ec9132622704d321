"""What libraries print of themselves while they load and run models. No torch."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the warnings and progress bars of libraries: a line on stderr is mopt's, or an error."""
    before, disabled = os.environ.get(_BARS), logging.root.manager.disable
    os.environ[_BARS] = "1"  # read when the Hub's library is imported
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if before is None:
            del os.environ[_BARS]
        else:
            os.environ[_BARS] = before
