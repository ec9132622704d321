"""The guards of what a Hub says and how long it may take that mutants.py takes away, each with its tests."""

from mutants_disk import Mutant

_HOSTILE = "checkpoint/hub/test_hostile.py::"
_PUSH = "commands/push/test_hostile_hub.py::"
_ANSWERS = "checkpoint/hub/test_answers.py"
_STALLS = f"{_HOSTILE}test_what_stalls_or_trickles_ends"


def _answers(what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("checkpoint/hub/answers.py", what, old, new, tests or (_ANSWERS,))


def _source(what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("checkpoint/hub/range_source.py", what, old, new, tests)


def _client(what: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("checkpoint/hub/client.py", what, old, new, tests)


HUB = (
    _answers("a commit is 40 hex digits", '_COMMIT = re.compile("[0-9a-f]{40}")', '_COMMIT = re.compile(".*")'),
    _answers("a digest is 64 hex digits", '_SHA256 = re.compile("[0-9a-f]{64}")', '_SHA256 = re.compile(".*")'),
    _answers("the whole text has the form", "pattern.fullmatch(found) is None", "pattern.match(found) is None"),
    _answers("text is text", "not isinstance(found, str) or pattern", "pattern"),
    _answers("a size is a number", "not isinstance(found, int) or isinstance(found, bool)", "isinstance(found, bool)"),
    _answers("true is no size", " or isinstance(found, bool) or", " or"),
    _answers("a size is not negative", "not 0 <= found <= most", "found > most"),
    _answers("a size is of this world", "not 0 <= found <= most", "found < 0"),
    _answers("a path has no empty part", 'not in ("", ".", "..")', 'not in (".", "..")'),
    _answers("a path does not lead up", 'not in ("", ".", "..")', 'not in ("", ".")'),
    _answers("a path has no dot", 'not in ("", ".", "..")', 'not in ("", "..")'),
    _answers("a path has no backslash", 'if "\\\\" in path or any', "if any"),
    _answers("a path has no control character", '{"Cc", "Cs"', '{"Cs"'),
    _answers("a path can be encoded", '{"Cc", "Cs"', '{"Cc"'),
    _answers("a path is one line", '"Zl", "Zp"}', "}"),
    _answers("names are of a length", " and len(name.encode()) <= _MAX_NAME_BYTES", ""),
    _answers("paths are of a length", "len(path.encode()) <= _MAX_PATH_BYTES and all", "all"),
    _answers("no path stands twice", "path in files or path in folders or len", "len"),
    _answers("files have an end", " or len(files) + len(folders) >= _MAX_FILES", ""),
    _answers(
        "all pages have one time",
        "return ask_once(partial(_list_files, repo_id, commit))",
        "return _list_files(repo_id, commit)",
        f"{_HOSTILE}test_a_list_of_files_without_end_ends",
    ),
    _answers("no file lies below a file", "if above in files:", "if False:"),
    _answers("both sizes are one", "!= size:", "!= found:"),
    _answers(
        "a commit asked for is the one",
        "if revision is not None and _COMMIT.fullmatch(revision):",
        "if False:",
        f"{_HOSTILE}test_a_commit_that_was_asked_for_is_the_one_that_is_read",
    ),
    _answers(
        "Xet is no place on this disk",
        'r"https?://[!-~]{1,1000}"',
        'r"[a-z]+://[!-~]{1,1000}"',
        f"{_HOSTILE}test_xet_is_no_place_on_this_disk",
        f"{_PUSH}test_xet_is_no_place_on_this_disk",
    ),
    _answers(
        "the next page is the Hub's",
        'dict(parse_qsl(further.partition("?")[2], keep_blank_values=True))',
        "{}",
        f"{_HOSTILE}test_the_next_page_is_asked_of_the_same_hub",
    ),
    Mutant(
        "commands/push/command.py",
        "Xet is no place on this disk",
        "    if sends_by_xet():\n",
        "    if False:\n",
        (f"{_PUSH}test_xet_is_no_place_on_this_disk",),
    ),
    Mutant(
        "checkpoint/hub/repo.py",
        "bytes are the listing's",
        "!= file.etag:",
        "!= found:",
        (f"{_HOSTILE}test_downloaded_bytes_are_those_of_the_listing",),
    ),
    Mutant(
        "checkpoint/hub/hub_path.py",
        "a revision does not lead up",
        ', *(uri.revision or "").split("/")}',
        "}",
        (f"{_HOSTILE}test_no_revision_leads_out_of_the_cache",),
    ),
    _source(
        "the link is to the listed file",
        "if (now.commit_hash, now.etag, now.size) != (self._commit, self._etag, self._num_bytes):",
        "if False:",
        "checkpoint/hub/test_faults.py::test_what_does_not_pass_is_one_line",
    ),
    _source("numbers have an end", "([0-9]{1,18})-([0-9]{1,18})", "([0-9]+)-([0-9]+)", _ANSWERS),
    _source("the range that was asked for", "int(found[1]) == begin and ", "", _ANSWERS),
    _source("no more than was asked for", "0 < length <= end - begin", "0 < length", _ANSWERS),
    _source("no bytes too many", "if len(chunk) > end - attempt.at:", "if False:", f"{_ANSWERS}::test_bytes_too_many"),
    _source("a range that stalls", "watch.STALL_S, moved=", "1e9, moved=", _STALLS),
    _source("stalls come to an end", "+ pause - since > watch.PATIENCE_S", "- since > 1e9", _STALLS),
    _source("a trickle is no progress", " and not isinstance(error, watch.StalledError):", ":", _ANSWERS),
    _client("questions that stall", "_retried(call), watch.ANSWER_S)", "_retried(call), 1e9)", _STALLS),
    _client(
        "calls that stall",
        "watch.watched(call, watch.ANSWER_S if seconds is None else seconds)",
        "watch.watched(call, 1e9)",
        f"{_PUSH}test_a_push_that_stalls_ends",
    ),
    _client(
        "a server's pause has an end",
        "min(float(said), _LONGEST_PAUSE_S)",
        "float(said)",
        f"{_HOSTILE}test_a_server_that_asks_to_wait_long_is_not_heeded_for_ever",
    ),
    _client(
        "an answer has an end",
        "if len(body) > _MAX_ANSWER_BYTES:",
        "if False:",
        f"{_HOSTILE}test_an_answer_without_end_is_not_kept",
    ),
    _client(
        "what a Hub says is printable",
        'char if char.isprintable() else "?"',
        "char",
        f"{_HOSTILE}test_what_the_hub_says_is_one_line_that_no_terminal_obeys",
    ),
    Mutant(
        "commands/push/command.py",
        "uploads that stall",
        "watch.watched(call, watch.ANSWER_S, moved",
        "watch.watched(call, 1e9, moved",
        (f"{_PUSH}test_a_push_that_stalls_ends",),
    ),
    Mutant(
        "checkpoint/hub/answers.py",
        "Xet is for a trusted Hub",
        "return use_xet() and constants.ENDPOINT in TRUSTED",
        "return use_xet()",
        ("commands/push/test_hostile_hub.py::test_xet_is_for_a_hub_that_is_trusted",),
    ),
    Mutant(
        "commands/push/command.py",
        "Xet is kept away from others",
        "    constants.HF_HUB_DISABLE_XET = not sends_by_xet()\n",
        "",
        ("commands/push/test_hostile_hub.py::test_xet_is_for_a_hub_that_is_trusted",),
    ),
    _client(
        "the token goes to the endpoint alone",
        'if is_ours and "authorization" in request.headers and not is_endpoint(request.url):',
        "if False:",
        f"{_PUSH}test_the_token_goes_to_the_endpoint_alone",
        f"{_HOSTILE}test_no_redirect_takes_the_token_elsewhere",
    ),
    _client(
        "whoever reads is guarded, too",
        "    guard_token()\n    return build_hf_headers(",
        "    return build_hf_headers(",
        f"{_HOSTILE}test_no_redirect_takes_the_token_elsewhere",
    ),
    _client(
        "whoever publishes is guarded, too",
        "    guard_token()\n    return HfApi(",
        "    return HfApi(",
        f"{_PUSH}test_the_client_is_guarded",
    ),
    _client(
        "an origin has a scheme",
        "(asked.scheme, asked.host, asked.port) == (endpoint.scheme, endpoint.host, endpoint.port)",
        "(asked.host, asked.port) == (endpoint.host, endpoint.port)",
        f"{_HOSTILE}test_no_redirect_takes_the_token_elsewhere",
        f"{_HOSTILE}test_the_token_stays_with_scheme_host_and_port",
    ),
    _client(
        "an origin has a port",
        "(asked.scheme, asked.host, asked.port) == (endpoint.scheme, endpoint.host, endpoint.port)",
        "(asked.scheme, asked.host) == (endpoint.scheme, endpoint.host)",
        f"{_HOSTILE}test_no_redirect_takes_the_token_elsewhere",
    ),
    _client(
        "requests of others pass",
        'is_ours and "authorization"',
        '"authorization"',
        f"{_HOSTILE}test_the_token_stays_with_scheme_host_and_port",
    ),
)
