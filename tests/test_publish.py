"""Publishing: what is sent and what never is, refusals, and a Hub that fails in every way that we know of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Tiny, write_project
from hub_server import Fault, HubServer, Repository, card_errors
from huggingface_hub import DatasetCard, HfApi, ModelCard
from peft import PeftConfig
from test_transfer import run_cli

from tuneshift import publish
from tuneshift.errors import PublishError, RunDirectoryError
from tuneshift.publish import RISKS, prepare, send
from tuneshift.report.card import COLUMNS, Published
from tuneshift.report.provenance import Licence, licence_of, public_settings
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger

MODEL, DATASET = "me/moved", "me/moved-pairs"
BOTH = Published(model_repo=MODEL, dataset_repo=DATASET, base_model="org/tiny-gemma", licence="mit")
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                 "tokenizer_config.json"}  # fmt: skip
SECRET = "sk-proj-abcdefghij0123456789"


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a project with a finished run, whose verdict is that no improvement is shown."""
    folder = tmp_path_factory.mktemp("published")
    config = write_project(folder, tiny, synthesis={"target_size": 6}, distill={"num_train_epochs": 1})
    assert run_cli("transfer", str(config), "--run-dir", str(folder / "run")) == 3
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDirectory:
    """Return a copy of the run whose verdict says that the target improved, with a manifest that vouches for it."""
    copy = RunDirectory(Path(shutil.copytree(finished / "run", tmp_path / "run")))
    rewrite(copy, lambda verdict: verdict | {"improved": True})
    return copy


def rewrite(run: RunDirectory, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    run.verdict.write_text(json.dumps(change(json.loads(run.verdict.read_text()))))
    assert run_cli("report", str(run.path)) == 0


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "WAITS", (0.01, 0.01))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def pushed(run: RunDirectory, hub: HubServer, *, token: str | None = None, private: bool = False) -> list[Any]:
    publication = prepare(run, BOTH, private=private, anyway=())
    return send(publication, HfApi(endpoint=hub.url, token=token or hub.token))


# --- what is sent ---


def test_adapter_dataset_and_cards_arrive_whole_and_nothing_else(run: RunDirectory, hub: HubServer) -> None:
    sent = pushed(run, hub)
    assert [one["changed"] for one in sent] == [True, True]
    model, dataset = hub.repositories[f"models/{MODEL}"], hub.repositories[f"datasets/{DATASET}"]
    assert set(model.files) == ADAPTER_FILES
    assert set(dataset.files) == {"README.md", "kept.jsonl"}
    assert (model.private, dataset.private) == (False, False)
    for name in ADAPTER_FILES - {"README.md", "adapter_config.json"}:
        assert model.files[name] == (run.adapter / name).read_bytes()
    assert model.lfs == {"adapter_model.safetensors"}
    assert dataset.files["kept.jsonl"] == run.dataset.read_bytes()
    assert sent[0]["url"] == f"{hub.url}/{MODEL}/commit/{model.commits[-1][0]}"


def test_no_path_of_this_machine_and_no_question_is_sent(run: RunDirectory, hub: HubServer, finished: Path) -> None:
    pushed(run, hub)
    files = {name: c for one in hub.repositories.values() for name, c in one.files.items()}
    questions = [json.loads(line)["prompt"] for line in (finished / "test.jsonl").read_text().splitlines()]
    for name, content in files.items():
        if name.endswith((".md", ".json", ".jsonl")):
            text = content.decode()
            assert str(finished.parent) not in text, name
            assert not any(json.dumps(question)[1:-1] in text for question in questions), name


def test_peft_finds_the_base_by_its_name_on_the_hub(run: RunDirectory, hub: HubServer, tmp_path: Path) -> None:
    pushed(run, hub)
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in hub.repositories[f"models/{MODEL}"].files.items():
        (folder / name).write_bytes(content)
    config = PeftConfig.from_pretrained(str(folder))
    assert (config.base_model_name_or_path, config.r) == ("org/tiny-gemma", 2)


def test_a_second_push_of_the_same_content_changes_nothing(run: RunDirectory, hub: HubServer) -> None:
    pushed(run, hub)
    hub.requests.clear()
    assert [one["changed"] for one in pushed(run, hub)] == [False, False]
    assert [len(one.commits) for one in hub.repositories.values()] == [2, 2]
    assert not any("/commit/" in request or request.startswith("PUT") for request in hub.requests)


def test_a_changed_card_alone_is_committed(run: RunDirectory, hub: HubServer) -> None:
    pushed(run, hub)
    rewrite(run, lambda verdict: verdict | {"mcnemar_p": 0.0123})
    assert [one["changed"] for one in pushed(run, hub)] == [True, True]
    assert hub.repositories[f"models/{MODEL}"].commits[-1][1] == ["README.md"]


# --- the command ---


def test_the_dry_run_tells_everything_and_asks_no_server(
    run: RunDirectory, hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    capsys.readouterr()
    assert run_cli("push", str(run.path), "--to", MODEL, "--dataset", DATASET) == 0
    said = capsys.readouterr().out
    for name in (*ADAPTER_FILES, "kept.jsonl", "ledger.sqlite", "evaluation", "config.yaml", "dry run", "--license"):
        assert name in said, name
    assert hub.requests == []
    assert run_cli("push", str(run.path), "--to", MODEL, "--json") == 0
    described = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert described["sent"] is None
    assert [upload["kind"] for upload in described["uploads"]] == ["model"]
    weights = (run.adapter / "adapter_model.safetensors").stat().st_size
    assert described["uploads"][0]["files"]["adapter_model.safetensors"] == weights
    assert {"dataset", "ledger.sqlite", "evaluation", "config.yaml"} <= set(described["withheld"])


def test_the_command_sends_with_the_token_of_the_environment_and_never_shows_it(
    run: RunDirectory, hub: HubServer
) -> None:
    command = [sys.executable, "-m", "tuneshift", "push", str(run.path), "--to", MODEL, "--private", "--go"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"sent: {hub.url}/{MODEL}/commit/" in done.stdout
    assert hub.repositories[f"models/{MODEL}"].private
    refused = subprocess.run(
        command, env=environment | {"HF_TOKEN": "hf_wrong"}, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 2
    assert "hf auth login" in refused.stderr
    for output in (done.stdout, done.stderr, refused.stdout, refused.stderr):
        assert hub.token not in output
        assert "hf_wrong" not in output


def test_without_a_token_nothing_is_asked(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PublishError, match="hf auth login"):
        send(prepare(run, BOTH, private=False, anyway=()))


# --- refusals ---


def test_a_run_that_is_not_finished_is_refused(run: RunDirectory) -> None:
    run.manifest.unlink()
    with pytest.raises(RunDirectoryError, match="not finished"):
        prepare(run, BOTH, private=False, anyway=RISKS)


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "dataset/kept.jsonl", "verdict.json"])
@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b" ")])
def test_a_file_that_the_manifest_does_not_vouch_for_is_refused(
    run: RunDirectory, name: str, change: Callable[[Path], object]
) -> None:
    change(run.path / name)
    with pytest.raises(RunDirectoryError, match=name):
        prepare(run, BOTH, private=False, anyway=RISKS)


def test_a_file_that_somebody_put_beside_the_adapter_is_not_sent(run: RunDirectory) -> None:
    (run.adapter / ".env").write_text(SECRET)
    (upload, _) = prepare(run, BOTH, private=False, anyway=()).uploads
    assert set(upload.content) == ADAPTER_FILES


def test_no_improvement_is_published_only_anyway_and_the_card_says_so(run: RunDirectory) -> None:
    rewrite(run, lambda verdict: verdict | {"improved": False})
    with pytest.raises(PublishError, match=r"no improvement is shown.*--anyway no-improvement"):
        prepare(run, BOTH, private=False, anyway=["personal-data"])
    publication = prepare(run, BOTH, private=False, anyway=["no-improvement"])
    card = publication.uploads[0].content["README.md"]
    assert isinstance(card, bytes)
    assert "No improvement shown" in card.decode()
    assert "no improvement is shown" in publication.notes[0]


def test_findings_are_refused_by_row_and_without_the_value(run: RunDirectory) -> None:
    rows = [json.loads(line) for line in run.dataset.read_text().splitlines()]
    rows[1]["response"] += f" {SECRET}"
    rows[2]["prompt"] = "call jane@mail.example " + rows[2]["prompt"]
    run.dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_cli("report", str(run.path)) == 0
    with pytest.raises(PublishError) as caught:
        prepare(run, Published(model_repo=MODEL), private=False, anyway=())  # the adapter may have learnt it
    assert rows[1]["id"] in str(caught.value)
    assert rows[2]["id"] in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "jane" not in str(caught.value)
    with pytest.raises(PublishError, match="with --anyway personal-data it is sent"):
        prepare(run, BOTH, private=False, anyway=["no-improvement"])
    publication = prepare(run, BOTH, private=False, anyway=["personal-data"])
    assert publication.findings["key or password"] == {"count": 1, "rows": [rows[1]["id"]]}
    assert SECRET not in json.dumps(publication.described())


def test_who_accepts_one_risk_has_not_accepted_the_other(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in run.dataset.read_text().splitlines()]
    rows[1]["response"] += f" {SECRET}"
    run.dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewrite(run, lambda verdict: verdict | {"improved": False})
    push = ("push", str(run.path), "--to", MODEL)
    for given, lacking in (
        ((), "--anyway no-improvement --anyway personal-data it is sent"),
        (("--anyway", "no-improvement"), "with --anyway personal-data it is sent"),
        (("--anyway", "personal-data"), "with --anyway no-improvement it is sent"),
        (("--anyway", "--go"), "no-improvement or personal-data"),
    ):
        capsys.readouterr()
        assert run_cli(*push, *given) == 2
        assert lacking in " ".join(capsys.readouterr().err.split())
    assert run_cli(*push, "--anyway", "no-improvement", "--anyway", "personal-data") == 0
    said = capsys.readouterr().out
    assert "note: the verdict is that no improvement is shown" in said
    assert "personal data or a secret: 1 of key or password" in said


@pytest.mark.parametrize(
    "name", ["moved", "me/moved/there", "me/mo ved", "me/-moved", "https://huggingface.co/me/x", ""]
)
def test_a_wrong_name_is_refused(run: RunDirectory, name: str) -> None:
    with pytest.raises(PublishError, match="OWNER/NAME"):
        prepare(run, Published(model_repo=MODEL, dataset_repo=name or "x"), private=False, anyway=())


def test_private_pairs_do_not_go_into_a_public_repository(run: RunDirectory, hub: HubServer) -> None:
    pushed(run, hub)
    with pytest.raises(PublishError, match="is public"):
        pushed(run, hub, private=True)
    assert len(hub.repositories[f"models/{MODEL}"].commits) == 2


def test_nothing_is_sent_to_any_repository_where_one_is_refused(run: RunDirectory, hub: HubServer) -> None:
    hub.repositories[f"datasets/{DATASET}"] = Repository(False)
    with pytest.raises(PublishError, match="is public"):
        pushed(run, hub, private=True)
    assert hub.repositories[f"models/{MODEL}"].files == {}


def test_whoever_sends_prompts_of_their_own_is_told(run: RunDirectory) -> None:
    own = "the pairs hold prompts of your own file, word for word"
    assert own not in prepare(run, BOTH, private=False, anyway=()).notes
    with Ledger(run.ledger) as ledger:
        ledger.record_calls([replace(ledger.calls()[0], id="listed", strategy="listed")])
    assert own in prepare(run, BOTH, private=False, anyway=()).notes
    assert own not in prepare(run, Published(model_repo=MODEL), private=False, anyway=()).notes


# --- a Hub that fails ---


@pytest.mark.parametrize(
    ("token", "owner", "said"),
    [
        ("hf_unknown", "me", "hf auth login"),
        (HubServer.reader, "me", "write access"),
        (None, "you", "may not write to you"),
    ],
)
def test_a_refusal_says_what_to_do_and_is_not_repeated(
    run: RunDirectory, hub: HubServer, token: str | None, owner: str, said: str
) -> None:
    publication = prepare(run, Published(model_repo=f"{owner}/x", licence="mit"), private=False, anyway=())
    with pytest.raises(PublishError, match=said):
        send(publication, HfApi(endpoint=hub.url, token=token or hub.token))
    assert sum(request == "POST /api/repos/create" for request in hub.requests) == 1
    assert hub.repositories == {}


CALLS = ["POST /api/repos/create", "GET /api/models", "POST /api/validate-yaml", "preupload", "objects/batch",
         "PUT /lfs/", "POST /lfs/verify", "POST /api/models/me/moved/commit"]  # fmt: skip


@pytest.mark.parametrize("how", [503, "reset", "torn"])
@pytest.mark.parametrize("where", CALLS)
def test_passing_trouble_in_any_call_is_got_over(
    run: RunDirectory, hub: HubServer, where: str, how: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.append(Fault(where, how))
    assert [one["changed"] for one in pushed(run, hub)] == [True, True]
    assert hub.faults[0].times == 0
    assert [len(one.commits) for one in hub.repositories.values()] == [2, 2]


@pytest.mark.parametrize("where", ["POST /api/repos/create", "POST /api/models/me/moved/commit"])
def test_an_answer_that_was_lost_commits_nothing_twice(run: RunDirectory, hub: HubServer, where: str) -> None:
    hub.faults.append(Fault(where, "lost"))
    pushed(run, hub)
    assert [len(one.commits) for one in hub.repositories.values()] == [2, 2]
    assert set(hub.repositories[f"models/{MODEL}"].files) == ADAPTER_FILES


@pytest.mark.parametrize("how", [500, "reset"])
def test_lasting_trouble_is_told(run: RunDirectory, hub: HubServer, how: int | str) -> None:
    hub.faults.append(Fault("POST /api/datasets/me/moved-pairs/commit", how, times=99))
    with pytest.raises(PublishError, match="dataset me/moved-pairs"):
        pushed(run, hub)
    assert hub.faults[0].times == 96
    hub.faults.clear()
    assert [one["changed"] for one in pushed(run, hub)] == [False, True]  # the model had arrived


def test_metadata_that_the_hub_refuses_is_told_before_anything_is_uploaded(run: RunDirectory, hub: HubServer) -> None:
    publication = prepare(run, Published(model_repo=MODEL, licence="none-of-them"), private=False, anyway=())
    with pytest.raises(PublishError, match="none of the Hub's"):
        send(publication, HfApi(endpoint=hub.url, token=hub.token))
    assert hub.objects == {}


# --- cards ---


def metadata(card: bytes | str) -> dict[str, Any]:
    text = card.decode() if isinstance(card, bytes) else card
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_model_card_holds_the_verdicts_numbers(run: RunDirectory) -> None:
    (model, _) = prepare(run, BOTH, private=False, anyway=()).uploads
    content = model.content["README.md"]
    assert isinstance(content, bytes)
    data = ModelCard(content.decode()).data
    verdict = json.loads(run.verdict.read_text())
    told = [data.get(field) for field in ("base_model", "license", "datasets", "library_name")]
    assert told == ["org/tiny-gemma", "mit", [DATASET], "peft"]
    (result,) = data.eval_results
    after = verdict["after"]
    assert (result.metric_type, result.metric_value) == (verdict["questions"]["metric"], after["accuracy"])
    assert result.metric_args == {"correct": after["correct"], "n": 5, **after["interval"]}
    assert result.dataset_args["sha256"] == verdict["questions"]["sha256"]
    assert card_errors(content.decode(), "model") == []


def test_regression_questions_have_results_of_their_own(run: RunDirectory) -> None:
    def with_regression(verdict: dict[str, Any]) -> dict[str, Any]:
        lost = {
            "difference": -0.2,
            "margin": 0.1,
            "lower_bound": -0.5,
            "non_inferior": None,
            "non_inferior_reason": "few",
        }
        same = {key: verdict[key] for key in ("before", "after", "difference_interval", "questions", "chance")}
        return verdict | {"regression": {**same, **lost, "negative_flips": verdict["negative_flips"]["before"]}}

    rewrite(run, with_regression)
    content = prepare(run, BOTH, private=False, anyway=()).uploads[0].content["README.md"]
    assert isinstance(content, bytes)
    assert [result.dataset_config for result in ModelCard(content.decode()).data.eval_results] == [
        "default",
        "regression",
    ]
    assert "a loss of 10 points is not ruled out" in content.decode()


def test_the_dataset_card_loads_the_pairs(run: RunDirectory, hub: HubServer, tmp_path: Path) -> None:
    from datasets import load_dataset

    pushed(run, hub)
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, content in hub.repositories[f"datasets/{DATASET}"].files.items():
        (folder / name).write_bytes(content)
    card = DatasetCard.load(folder / "README.md")
    assert card.data.size_categories == ["n<1K"]
    assert card_errors((folder / "README.md").read_text(), "dataset") == []
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == list(COLUMNS)
    assert len(rows) == 6


def test_the_cards_of_a_run_are_written_at_its_end_and_claim_nothing_that_nobody_said(finished: Path) -> None:
    model = (finished / "run/adapter/README.md").read_text()
    dataset = (finished / "run/dataset/README.md").read_text()
    assert "base_model" not in metadata(model)  # a folder is no id on the Hub
    for card, kind in ((model, "model"), (dataset, "dataset")):
        assert "license" not in metadata(card)
        assert card_errors(card, kind) == []
        assert "not known (there is no README.md in the model's folder)" in card
        assert "tuneshift transfer config.yaml" in card
        assert str(finished) not in card
    files = json.loads((finished / "run/manifest.json").read_text())["files"]
    assert {"adapter/README.md", "dataset/README.md"} <= set(files)


def test_a_run_without_questions_has_cards_without_results(run: RunDirectory) -> None:
    rewrite(run, lambda verdict: verdict | {"improved": None, "reason": "No evaluation is configured."})
    publication = prepare(run, BOTH, private=False, anyway=())
    content = publication.uploads[0].content["README.md"]
    assert isinstance(content, bytes)
    assert "model-index" not in metadata(content)
    assert "No evaluation is configured." in content.decode()
    assert any("nothing was evaluated" in note for note in publication.notes)


def test_licences_come_from_the_models_own_cards(tmp_path: Path) -> None:
    for name, head, expected in (
        ("plain", "license: apache-2.0", Licence("apache-2.0")),
        ("other", "license: other\nlicense_name: house-rules", Licence("house-rules")),
        ("none", "tags: [x]", Licence(None, "the model's card names none")),
        ("broken", "license: [", Licence(None, "the model's card cannot be read: ParserError")),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{head}\n---\n# Model\n")
        assert licence_of(str(tmp_path / name)) == expected
    assert licence_of(str(tmp_path)).identifier is None


def test_licences_of_models_on_the_hub_are_asked_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.repositories["models/org/named"] = Repository(False, {"README.md": b"---\nlicense: mit\n---\n"})
    hub.repositories["models/org/silent"] = Repository(False)
    assert licence_of("org/named") == Licence("mit")
    assert licence_of("org/silent") == Licence(None, "the model's card names none")
    assert licence_of("org/unknown") == Licence(None, "the model's card cannot be read: HfHubHTTPError")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert licence_of("org/unreachable") == Licence(None, "the model's card cannot be read: ConnectError")


def test_settings_are_shown_without_keys_addresses_and_places() -> None:
    raw = {
        "source": {"base": "/home/jane doe/models/base", "adapter": "~jane/secret/adapter"},
        "target": {"model": "org/model"},
        "generator": {"api": {"model": "big", "api_key": SECRET, "base_url": "inside:8000/v1"}},
        "distill": {"trainer_args": {"hub_token": SECRET, "max_steps": 3}},
        "prompt_template": "/ask {text}\n",
        "synthesis": {"stop": ["\n"], "target_size": 5},
        "engine": {"ray_address": "10.20.0.7:6379", "servers": ["http://in:8"], "device": "cpu"},
        "seeds": ["/home/jane/x", "http://in:8", "models/../../../home/jane/m", ["../jane/y"], {"token": SECRET}],
        "dataset": "models/../../../home/jane/m",
    }
    shown, left_out = public_settings(raw)
    assert shown["source"] == {"base": "base", "adapter": "adapter"}
    assert shown["generator"] == {"api": {"model": "big"}}
    assert shown["distill"] == {"trainer_args": {"max_steps": 3}}
    assert shown["engine"] == {"device": "cpu"}
    assert shown["seeds"] == ["x", "m", ["y"], {}]
    assert shown["dataset"] == "m"
    assert left_out == [
        "generator.api.api_key", "generator.api.base_url", "distill.trainer_args.hub_token", "engine.ray_address",
        "engine.servers.0", "seeds.1", "seeds.4.token",
    ]  # fmt: skip
    for key in ("target", "prompt_template", "synthesis"):
        assert shown[key] == raw[key]
