"""``python -m modelopt_convert`` is ``mopt``: signals are handled before anything that takes time is imported."""

import sys

from modelopt_convert.run.signals import leave_at_once


def main() -> None:
    """Entry point."""
    leave_at_once()
    from modelopt_convert.run.boundary import last_words
    from modelopt_convert.run.terminal import first_sign

    try:
        with first_sign():
            from modelopt_convert.cli import main as run
    except Exception as error:  # no memory, or no descriptor, is left for what is imported
        sys.exit(last_words(error, where="the system"))
    run()


if __name__ == "__main__":
    main()
