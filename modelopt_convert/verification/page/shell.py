"""The frame of a page: one file that runs no script and fetches nothing. Pure."""

import base64
import hashlib
from collections.abc import Sequence

from modelopt_convert.verification.page.markup import text


def whole(head: str, title: str, style: str, parts: Sequence[str]) -> str:
    """A page.

    Args:
        head: The first lines, by which mopt knows a page of its own.
        title: Of the window, unescaped.
        style: The stylesheet.
        parts: HTML; empty ones are left out.
    """
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        f"{head}"
        # A second line behind the escaping: no script may run, and nothing may be fetched.
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )
