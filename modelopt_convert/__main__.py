"""``python -m modelopt_convert`` is ``mopt``: signals are handled before anything that takes time is imported."""

from modelopt_convert.run.signals import leave_at_once


def main() -> None:
    """Entry point."""
    leave_at_once()
    from modelopt_convert.cli import main as run

    run()


if __name__ == "__main__":
    main()
