"""Who may do what with a repo, and the errors by which the client is told."""

from loopback_hub.plumbing import Plumbing
from loopback_hub.records import HubError
from loopback_hub.store import Repo


class Access(Plumbing):
    """Finds the repo of a request, or refuses it."""

    def repo(self, repo_id: str) -> Repo:
        """A repo that the user may know of."""
        repo, user = self.hub.store.repos.get(repo_id), self.user()
        if repo is None or (repo.private and user != repo.owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def readable(self, repo_id: str) -> Repo:
        """A repo whose contents the user may have."""
        repo, user = self.repo(repo_id), self.user()
        if repo.gated and user != repo.owner:
            restricted = f"Access to model {repo_id} is restricted"
            if user is None:
                raise HubError(401, f"{restricted}. Please log in.", "GatedRepo")
            raise HubError(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")
        return repo

    def writable(self, repo_id: str, revision: str = "main") -> Repo:
        """A repo that the user may change; a pull request is open to everyone who may read."""
        if "create_pr" in self.query or revision.startswith("refs/pr/"):
            repo = self.readable(repo_id)
            if self.user() is None:
                raise HubError(401, "Invalid username or password.")
            return repo
        repo, user = self.repo(repo_id), self.user()
        if user != repo.owner:
            raise HubError(403 if user else 401, "Forbidden: you don't have write access")
        return repo
