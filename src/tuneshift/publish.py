"""Publishing a run on the Hugging Face Hub: the adapter with its card and, where asked for, the dataset with its own.

`prepare` decides and sends nothing, `send` sends what was prepared. What belongs to the user is never sent: the ledger,
the seeds, the questions and the answers to them, the configuration file. Only where a run takes its prompts from a file
(`generator.kind: file`) does its dataset hold the user's own words, and a note says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tuneshift.console import clean
from tuneshift.errors import PublishError
from tuneshift.report.card import Facts, Published, dataset_card, model_card, read_facts
from tuneshift.report.privacy import scan
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger
from tuneshift.run.manifest import read_manifest

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

Result = TypeVar("Result")
RISKS = NO_IMPROVEMENT, PERSONAL_DATA = "no-improvement", "personal-data"
"""What speaks against publishing a run, each of its own kind: who accepts one has not accepted the other."""
WAITS = (1.0, 5.0)  # seconds before the second and the third attempt; a guess
PASSING = (408, 429, 500, 502, 503, 504)  # status codes after which another attempt may succeed; as huggingface_hub's


@dataclass(frozen=True)
class Upload:
    """A repository and what it gets: `content` is a file's path, or bytes that were made for publishing, by name."""

    repo: str
    kind: str
    content: dict[str, Path | bytes]

    def sizes(self) -> dict[str, int]:
        """Return each file's size in bytes."""
        return {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.content.items()}


@dataclass(frozen=True)
class Publication:
    """What a run sends, and what it does not; `findings` is what `privacy.scan` says of the rows and the cards."""

    uploads: list[Upload]
    private: bool
    withheld: list[str]
    findings: dict[str, dict[str, Any]]
    notes: list[str]

    def described(self) -> dict[str, Any]:
        """Return it for people and for JSON: no content."""
        return {
            "uploads": [{"repo": one.repo, "kind": one.kind, "files": one.sizes()} for one in self.uploads],
            "private": self.private,
            "withheld": self.withheld,
            "findings": self.findings,
            "notes": self.notes,
        }


def prepare(run: RunDirectory, published: Published, *, private: bool, anyway: Collection[str]) -> Publication:
    """Return what the run would send; `anyway` are the `RISKS` that the publisher accepts.

    Raises:
        RunDirectoryError: the run is not finished, or a file is not what the manifest vouches for.
        PublishError: a repository's name or a risk's is none, or a risk that is not accepted speaks against it.
    """
    for repo in filter(None, (published.model_repo, published.dataset_repo)):
        _check_name(repo)
    if unknown := [word for word in anyway if word not in RISKS]:
        raise PublishError(f"--anyway {unknown[0]}: give the risk that you accept, {' or '.join(RISKS)}.")
    manifest = read_manifest(run)
    with Ledger(run.ledger) as ledger:
        facts = read_facts(run, ledger, manifest)
    uploads = _uploads(run, facts, published, list(manifest["files"]))
    cards = {f"{one.repo}/README.md": one.content["README.md"] for one in uploads}
    findings = scan(
        [
            *((row["id"], f"{row['prompt']}\n{row['response']}") for row in facts.rows),
            *((name, card.decode()) for name, card in cards.items() if isinstance(card, bytes)),
        ]
    )
    objections = _objections(facts, findings)
    if refused := {risk: why for risk, why in objections.items() if risk not in anyway}:
        accepted = " ".join(f"--anyway {risk}" for risk in refused)
        raise PublishError(
            f"{run.path}: {' '.join(refused.values())} Nothing was sent; with {accepted} it is sent all the same."
        )
    sent = {"adapter", "dataset"} if published.dataset_repo else {"adapter"}
    withheld = sorted(path.name for path in run.path.iterdir() if path.name not in sent | {".lock"})
    return Publication(uploads, private, withheld, findings, [*objections.values(), *_notes(facts, published)])


def send(publication: Publication, api: HfApi | None = None) -> list[dict[str, Any]]:
    """Send it, and return for each repository the commit, its address, and whether it changed anything.

    All repositories are opened before the first gets anything. What fails in passing is tried three times. Each attempt
    starts anew and finds what is there already, so that an attempt whose answer was lost changes nothing twice.

    Raises:
        PublishError: the Hub refuses or keeps failing. What was sent before stays.
    """
    from huggingface_hub import HfApi, get_token

    if api is None:
        if get_token() is None:
            raise PublishError("the Hub needs a token: run `hf auth login`, or set HF_TOKEN. Nothing was sent.")
        api = HfApi(library_name="tuneshift")
    newest = [_open(upload, api, private=publication.private) for upload in publication.uploads]
    return [_send(upload, api, before) for upload, before in zip(publication.uploads, newest, strict=True)]


def publication_lines(described: dict[str, Any]) -> list[str]:
    """Return what `Publication.described` says as lines for a terminal, with `sent`, `None` for a dry run."""
    lines = []
    for upload in described["uploads"]:
        which = "private, " if described["private"] else ""
        lines.append(f"{upload['kind']} repository {upload['repo']} ({which}made where there is none)")
        lines += [f"  {size:>13,} bytes  {name}" for name, size in upload["files"].items()]
    lines.append(f"not sent: seeds, questions, and of the run {', '.join(described['withheld'])}")
    found = [f"{one['count']} of {kind}" for kind, one in described["findings"].items() if one["count"]]
    lines.append(f"looks like personal data or a secret: {', '.join(found) or 'nothing that has a form'}")
    lines += [f"note: {note}" for note in described["notes"]]
    changes = {True: "sent", False: "nothing has changed"}
    lines += [f"{changes[one['changed']]}: {one['url']}" for one in described["sent"] or []]
    if described["sent"] is None:
        lines.append("dry run: nothing was sent. --go sends it.")
    return [clean(line) for line in lines]


def _uploads(run: RunDirectory, facts: Facts, published: Published, vouched: list[str]) -> list[Upload]:
    """Return the uploads; of the folders only what the manifest vouches for, and cards that know where they go."""

    def files(folder: Path) -> dict[str, Path | bytes]:
        paths = [run.path / name for name in vouched]
        return {path.name: path for path in paths if path.parent == folder}

    assert published.model_repo is not None
    adapter = files(run.adapter)
    adapter["README.md"] = model_card(facts, published).encode()
    adapter["adapter_config.json"] = _adapter_config(run.adapter / "adapter_config.json", facts, published)
    uploads = [Upload(published.model_repo, "model", dict(sorted(adapter.items())))]
    if published.dataset_repo is not None:
        dataset = files(run.dataset.parent) | {"README.md": dataset_card(facts, published).encode()}
        uploads.append(Upload(published.dataset_repo, "dataset", dict(sorted(dataset.items()))))
    return uploads


def _adapter_config(path: Path, facts: Facts, published: Published) -> bytes:
    """Return PEFT's file with the target's Hub id, or its bare name, in place of a path on this machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = facts.base_model(published) or facts.models["target.model"].name
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _objections(facts: Facts, findings: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return why each risk that the run has speaks against publishing it."""
    found = [
        f"{one['count']} of {kind} in {', '.join(one['rows'][:5])}{' and others' if one['rows'][5:] else ''}"
        for kind, one in findings.items()
        if one["count"]
    ]
    objections = {}
    if facts.verdict["improved"] is False:
        objections[NO_IMPROVEMENT] = "the verdict is that no improvement is shown."
    if found:
        objections[PERSONAL_DATA] = (
            "the pairs that the adapter learnt from, or a card, hold what looks like personal data or a secret: "
            f"{'; '.join(found)}."
        )
    return objections


def _notes(facts: Facts, published: Published) -> list[str]:
    notes = []
    if facts.base_model(published) is None:
        target = facts.models["target.model"].name
        notes.append(f"the target came from a folder, {target}: --base-model OWNER/NAME tells PEFT where to find it")
    licence = facts.licence(published)
    if licence.identifier is None:
        notes.append(f"the cards name no licence: {licence.reason}; --license states one")
    if facts.verdict["improved"] is None:
        notes.append("nothing was evaluated, and the cards say so")
    if facts.own_prompts and published.dataset_repo is not None:
        notes.append("the pairs hold prompts of your own file, word for word")
    return notes


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PublishError(f"{repo!r} is no name of a repository: {error} Give OWNER/NAME.") from error
    if repo.count("/") != 1:
        raise PublishError(f"{repo!r} is no name of a repository. Give OWNER/NAME.")


def _open(upload: Upload, api: HfApi, *, private: bool) -> str | None:
    return _attempt(upload, lambda: _open_repository(upload, api, private=private))


def _send(upload: Upload, api: HfApi, before: str | None) -> dict[str, Any]:
    commit = _attempt(upload, lambda: _commit(upload, api))
    return {"repo": upload.repo, "kind": upload.kind, "url": commit.commit_url, "changed": commit.oid != before}


def _open_repository(upload: Upload, api: HfApi, *, private: bool) -> str | None:
    """Create the repository where there is none, and return its newest commit."""
    api.create_repo(upload.repo, repo_type=upload.kind, private=private or None, exist_ok=True)
    there = api.repo_info(upload.repo, repo_type=upload.kind)
    if private and not there.private:
        raise PublishError(
            f"{upload.repo} is there already and is public. Make it private on the Hub, or name another repository. "
            "Nothing was sent."
        )
    return there.sha


def _commit(upload: Upload, api: HfApi) -> CommitInfo:
    """Commit what differs from what is there; the operations are new each time, since the client notes in them."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, content) for name, content in upload.content.items()]
    return api.create_commit(upload.repo, operations, commit_message="Publish with TuneShift", repo_type=upload.kind)


def _attempt(upload: Upload, step: Callable[[], Result]) -> Result:
    """Return what a step returns, after up to three attempts."""
    from huggingface_hub.errors import HTTPError

    for wait in (*WAITS, None):
        try:
            return step()
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            # The client wraps what befalls a large file.
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            if wait is None or not _passes(cause):
                raise PublishError(_refusal(upload, cause)) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _passes(error: BaseException) -> bool:
    """Tell whether another attempt may succeed: a server's passing trouble, a torn connection or a torn answer."""
    from huggingface_hub.errors import HTTPError

    status = _status(error)
    return (
        status in PASSING
        if status is not None
        else isinstance(error, (HTTPError, ConnectionError, json.JSONDecodeError))
    )


def _refusal(upload: Upload, error: BaseException) -> str:
    """Return what the Hub said and what to do; of other errors the kind alone, since they may quote a request."""
    status, owner = _status(error), upload.repo.split("/")[0]
    if status is not None:
        said = f"status {status}: {getattr(error, 'server_message', None) or 'no reason given'}"
    elif str(error).startswith("Invalid metadata"):  # what huggingface_hub makes of the Hub's check of a card
        said = str(error)
    else:
        said = type(error).__name__
    remedies = {
        401: "The token is missing, wrong or expired: run `hf auth login`, or set HF_TOKEN.",
        403: f"The token may not write to {owner}: take one with write access, or your own account.",
        404: f"There is no account {owner}, or the token may not see it.",
    }
    again = "Try again later: what has arrived is not sent twice." if _passes(error) else ""
    parts = (f"the Hub did not take {upload.kind} {upload.repo}: {said[:500]}", remedies.get(status or 0, again))
    return ". ".join(" ".join(part.split()).rstrip(".") for part in parts if part) + "."
