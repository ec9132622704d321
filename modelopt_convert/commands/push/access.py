"""Who we are to the Hub, and whether we may publish there: asked before any work."""

import re
from functools import partial

from modelopt_convert.checkpoint.hub.answers import Answer
from modelopt_convert.checkpoint.hub.client import ask_once, hub_api, hub_errors, page_of
from modelopt_convert.run.errors import InputError

_NAME = re.compile(r"[\w.-]{1,100}", re.ASCII)


def check_access(repo_id: str, *, create_pr: bool, private: bool, again: str) -> bool:
    """Whether the repo exists; refuses where it cannot be written, or where it does not exist and cannot be created.

    Args:
        repo_id: ORGANIZATION/NAME.
        create_pr: A pull request needs no right to write.
        private: That it must not be public.
        again: How to try again, for hints.

    Raises:
        MoptError: With a ``hub.*`` code, or InputError ``push.public``.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    api = hub_api()
    with hub_errors(repo_id, again):
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise InputError(
                f"hf://{repo_id}: not a repo name",
                code="hub.repo_id",
                path=f"hf://{repo_id}",
                hint="names are ORGANIZATION/NAME; `hf auth whoami` says your own",
            )
        me = Answer(repo_id, "who you are", ask_once(api.whoami))
        try:
            ask_once(partial(api.auth_check, repo_id, write=not create_pr))
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            _check_can_create(repo_id, me)
            return False
        if private and ask_once(partial(api.repo_info, repo_id)).private is not True:
            raise InputError(
                f"hf://{repo_id}: the repo is public, --private was given",
                code="push.public",
                path=f"hf://{repo_id}",
                hint=f"make it private at {page_of(repo_id)}/settings, or give another name",
            )
    return True


def _check_can_create(repo_id: str, me: Answer) -> None:
    """Refuse what is sure to fail; a fine-grained token may still be refused when the repo is created."""
    name = me.text("name", _NAME, "a name")
    owners = [name, *(one.text("name", _NAME, "a name") for one in me.parts("orgs"))]
    token = me.part("auth").part("accessToken") if me.has("auth") and me.part("auth").has("accessToken") else None
    why = None
    if repo_id.partition("/")[0].lower() not in {owner.lower() for owner in owners}:
        why = f"{name} sees no such repo, and may create repos under {', '.join(owners)} only"
    elif token is not None and token.has("role") and token.text("role", _NAME, "a role") == "read":
        why = f"no such repo, and {name}'s token may only read"
    if why is not None:
        raise InputError(
            f"hf://{repo_id}: {why}",
            code="hub.forbidden",
            path=f"hf://{repo_id}",
            hint="check the name, or take a token with write access: `hf auth login`, or HF_TOKEN",
        )
