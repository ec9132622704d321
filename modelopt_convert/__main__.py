"""``python -m modelopt_convert`` is ``mopt``."""

from modelopt_convert.cli import main

if __name__ == "__main__":
    main()
