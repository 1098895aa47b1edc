"""Training in several processes: against one process, against itself when interrupted, and without orphans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CORPUS, Tiny, write_jsonl, write_project
from safetensors.torch import load_file
from test_transfer import run_cli

import tuneshift.launch as launch
from tuneshift.config import load_config
from tuneshift.demo import prepare_models
from tuneshift.distill import Pair, TrainingSettings, TrainingSummary, newest_sealed_checkpoint
from tuneshift.errors import ConfigError, ModelError, TrainingError
from tuneshift.launch import check_processes, read_processes
from tuneshift.models import LoadOptions

ROOT = Path(__file__).parents[1]
SHARDING_WORKER = str(Path(__file__).with_name("fsdp_worker.py"))
PAIRS = [Pair(f"Request: {text}\nIntent:", f" {text.split()[0]} it") for text in CORPUS[:5] * 2]
EPOCHS, STEPS_PER_EPOCH = 3, 3  # ten pairs, four a step: the last step of an epoch has two
KINDS = ["cpu", "fsdp"]


class Stopped(Exception):
    """Stands for an interruption of the process that waits for the training."""


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    """Two processes with a thread each are quicker here than two with all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shipped accelerate configurations; that of the GPUs with two processes on the CPU."""
    sharded = yaml.safe_load((ROOT / "configs/fsdp.yaml").read_text()) | {"use_cpu": True, "num_processes": 2}
    path = tmp_path_factory.mktemp("accelerate") / "fsdp.yaml"
    path.write_text(yaml.safe_dump(sharded))
    return {"cpu": str(ROOT / "configs/cpu.yaml"), "fsdp": str(path)}


def settings_of(tiny: Tiny, **options: Any) -> TrainingSettings:
    settings = TrainingSettings(
        str(tiny.gemma),
        r=4,
        lora_dropout=0.0,
        num_train_epochs=EPOCHS,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        load=LoadOptions(device="cpu", dtype="float32"),
    )
    return replace(settings, **options)


def train(folder: Path, settings: TrainingSettings, **options: Any) -> TrainingSummary:
    return launch.train(
        PAIRS, settings, output_dir=folder / "adapter", checkpoint_dir=folder / "checkpoints", **options
    )


def train_in_two(folder: Path, settings: TrainingSettings, kind: str, path: str, **options: Any) -> TrainingSummary:
    """Train in two processes, with half the batch on each."""
    half = settings.per_device_train_batch_size // 2
    with pytest.MonkeyPatch.context() as patch:
        if kind == "fsdp":
            patch.setattr(launch, "WORKER", (SHARDING_WORKER,))
        return train(folder, replace(settings, accelerate=path, per_device_train_batch_size=half), **options)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


def furthest(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(two)
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def alone(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingSummary]:
    """A training in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder, settings_of(tiny))


@pytest.fixture(scope="module", params=KINDS)
def together(
    request: pytest.FixtureRequest, tiny: Tiny, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, TrainingSummary, list[tuple[int, int]]]:
    """The same training in two processes: kind, folder, summary, and the steps as they were told."""
    folder, told = tmp_path_factory.mktemp(request.param), []
    summary = train_in_two(
        folder,
        settings_of(tiny),
        request.param,
        files[request.param],
        on_step=lambda done, total, numbers: told.append((done, total)),
    )
    return request.param, folder, summary, told


# Two processes do what one does


def test_two_processes_train_the_adapter_of_one_with_twice_the_batch(together: Any, alone: Any) -> None:
    _, folder, _, _ = together
    trained = adapter(folder)
    assert max(value.abs().max().item() for name, value in trained.items() if "lora_B" in name) > 1e-2
    assert furthest(trained, adapter(alone[0])) < 1e-5  # of 1e-2: the order of float32 sums


def test_the_summary_counts_what_all_processes_did_once(together: Any, alone: Any) -> None:
    _, _, summary, told = together
    assert summary.processes == 2
    assert alone[1].processes == 1
    assert summary.losses == pytest.approx(alone[1].losses, abs=1e-5)
    same = ("steps", "trained_tokens", "target_modules", "peak_cuda_memory_bytes")
    assert {key: asdict(summary)[key] for key in same} == {key: asdict(alone[1])[key] for key in same}
    assert told == [(step, EPOCHS * STEPS_PER_EPOCH) for step in range(1, EPOCHS * STEPS_PER_EPOCH + 1)]


def test_sharding_really_splits_the_adapter(together: Any) -> None:
    kind, folder, _, _ = together
    parts = sorted(path.name for path in folder.glob("checkpoints/checkpoint-9/pytorch_model_fsdp_0/*.distcp"))
    assert parts == (["__0_0.distcp", "__1_0.distcp"] if kind == "fsdp" else [])


def test_the_saved_adapter_is_complete_for_peft(together: Any, alone: Any) -> None:
    _, folder, _, _ = together
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert names == {path.name for path in (alone[0] / "adapter").iterdir()}
    written = json.loads((folder / "adapter/adapter_config.json").read_text())
    expected = json.loads((alone[0] / "adapter/adapter_config.json").read_text())
    for config in (written, expected):
        config["target_modules"].sort()  # peft writes a set
    assert written == expected


def test_accumulated_batches_weigh_as_one(tiny: Tiny, files: dict[str, str], alone: Any, tmp_path: Path) -> None:
    settings = settings_of(tiny, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    summary = train_in_two(tmp_path, settings, "cpu", files["cpu"])
    assert summary.steps == alone[1].steps
    assert furthest(adapter(tmp_path), adapter(alone[0])) < 1e-5


def test_frozen_bf16_weights_are_sharded_beside_an_fp32_adapter(
    tiny: Tiny, files: dict[str, str], tmp_path: Path
) -> None:
    settings = settings_of(tiny, num_train_epochs=1, load=LoadOptions(device="cpu", dtype="bfloat16"))
    for kind in KINDS:
        train_in_two(tmp_path / kind, settings, kind, files[kind])
    copied, sharded = (adapter(tmp_path / kind) for kind in KINDS)
    assert {value.dtype for value in sharded.values()} == {torch.float32}
    assert furthest(copied, sharded) < 1e-5  # each process computes what it does without sharding


# Interruption


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_goes_on_to_the_same_adapter(
    kind: str, tiny: Tiny, files: dict[str, str], tmp_path: Path
) -> None:
    settings = settings_of(tiny, lora_dropout=0.1)  # each process has a random state of its own to go on with
    train_in_two(tmp_path / "whole", settings, kind, files[kind])

    def stop(done: int, total: int, numbers: Mapping[str, float]) -> None:
        if done == 2 * STEPS_PER_EPOCH + 1:
            raise Stopped

    with pytest.raises(Stopped):
        train_in_two(tmp_path / "stopped", settings, kind, files[kind], on_step=stop)
    assert processes_of(tmp_path / "stopped") == []
    newest = newest_sealed_checkpoint(tmp_path / "stopped/checkpoints")
    assert newest is not None
    assert newest.endswith("checkpoint-6")
    told: list[int] = []
    summary = train_in_two(
        tmp_path / "stopped", settings, kind, files[kind], on_step=lambda done, *_: told.append(done)
    )
    assert told == [7, 8, 9]
    assert summary.tokens_per_second is None
    assert furthest(adapter(tmp_path / "stopped"), adapter(tmp_path / "whole")) == 0


def test_a_torn_shard_is_never_continued(tiny: Tiny, together: Any, files: dict[str, str], tmp_path: Path) -> None:
    kind, folder, _, _ = together
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    name = "pytorch_model_fsdp_0/__1_0.distcp" if kind == "fsdp" else "rng_state_1.pth"
    torn = tmp_path / "checkpoints/checkpoint-9" / name
    torn.write_bytes(torn.read_bytes()[:-10])
    told: list[int] = []
    train_in_two(tmp_path, settings_of(tiny), kind, files[kind], on_step=lambda done, *_: told.append(done))
    assert told == [7, 8, 9]
    assert furthest(adapter(tmp_path), adapter(folder)) == 0


def test_checkpoints_of_another_file_s_processes_are_not_continued(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "accelerate.yaml", tmp_path / "checkpoints/checkpoint-3"
    for text, kept in (("a: 1", False), ("a: 1", True), ("a: 2", False)):
        path.write_text(text)
        copied = launch._copied_config(path, tmp_path / "checkpoints")
        assert copied.read_text() == text
        assert checkpoint.exists() == kept
        checkpoint.mkdir(exist_ok=True)


PARENT = """
import json, sys
from pathlib import Path
from tuneshift.distill import Pair, TrainingSettings
from tuneshift.launch import train
from tuneshift.models import LoadOptions
pairs, settings, folder = json.loads(sys.argv[1])
settings["load"] = LoadOptions(**settings["load"])
train([Pair(**pair) for pair in pairs], TrainingSettings(**settings), output_dir=Path(folder) / "adapter",
        checkpoint_dir=Path(folder) / "checkpoints", on_step=lambda *step: print(*step, flush=True))
"""


def processes_of(folder: Path) -> list[int]:
    """Return the processes, launcher included, whose job lies in `folder`."""
    job, found = str(folder / "checkpoints/job.json").encode(), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if job in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found


def start_parent(tiny: Tiny, path: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    settings = asdict(settings_of(tiny, accelerate=path, num_train_epochs=5000, **options))
    arguments = json.dumps([[asdict(pair) for pair in PAIRS], settings, str(folder)])
    return subprocess.Popen([sys.executable, "-c", PARENT, arguments], stdout=subprocess.PIPE, text=True)


def gone(folder: Path, *, within: float = 30.0) -> bool:
    deadline = time.monotonic() + within
    while processes_of(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def wait_for_steps(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    assert parent.stdout.readline().startswith("1 ")


def wait_for_the_launcher(parent: subprocess.Popen[str], folder: Path) -> None:
    while not processes_of(folder):
        assert parent.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "when"),
    [(signal.SIGKILL, "while it trains"), (signal.SIGTERM, "while it trains"), (signal.SIGKILL, "while it starts")],
)
def test_no_process_outlives_the_one_that_wanted_the_training(
    when: str, number: signal.Signals, tiny: Tiny, files: dict[str, str], tmp_path: Path
) -> None:
    with start_parent(tiny, files["cpu"], tmp_path) as parent:
        if when == "while it trains":
            wait_for_steps(parent)
            assert len(processes_of(tmp_path)) == 3  # the launcher and two that train
        else:
            wait_for_the_launcher(parent, tmp_path)
        parent.send_signal(number)
        parent.wait()
    assert gone(tmp_path), (tmp_path / "checkpoints/log.txt").read_text()[-2000:]
    assert not list(tmp_path.glob("adapter*"))


def test_a_killed_training_process_ends_the_training_with_its_name(
    tiny: Tiny, files: dict[str, str], tmp_path: Path
) -> None:
    def kill_one(done: int, total: int, loss: float | None) -> None:
        if done == 2:
            os.kill(max(processes_of(tmp_path)), signal.SIGKILL)

    settings = settings_of(tiny, num_train_epochs=5000)
    with pytest.raises(TrainingError, match=r"ended with code 1:[\s\S]*Signal 9[\s\S]*same command goes on"):
        train_in_two(tmp_path, settings, "cpu", files["cpu"], on_step=kill_one)
    assert gone(tmp_path)


# What is wrong is told


def test_a_users_error_in_a_process_is_the_error_of_the_run(tiny: Tiny, files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^distill\.target_modules: .*no_such_proj"):
        train_in_two(tmp_path, settings_of(tiny, target_modules=["no_such_proj"]), "cpu", files["cpu"])
    assert gone(tmp_path)


def test_what_fails_in_a_process_is_shown(tiny: Tiny, files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "accelerate.yaml"
    config = yaml.safe_load(Path(files["fsdp"]).read_text())
    config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = "NoSuchLayer"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(TrainingError) as caught:
        train_in_two(tmp_path, settings_of(tiny), "fsdp", str(path))
    said = str(caught.value)
    assert said.startswith(f"{path}: the training's processes ended with code 1:\nprocess ")
    assert "NoSuchLayer" in said
    assert str(tmp_path / "checkpoints/log.txt") in said


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"num_procs": 2}, r"unknown keys \(\['num_procs'\]\).*accelerate config"),
    "no kind": ({"distributed_type": None}, "no accelerate configuration that can be used"),
    "an unknown kind": ({"distributed_type": "MANY"}, "'MANY' is not a valid DistributedType"),
    "one process": ({"distributed_type": "NO"}, "distributed_type is NO, but .*leave distill.accelerate out"),
    "mpirun": ({"distributed_type": "MULTI_CPU"}, "distributed_type is MULTI_CPU, but .*use_cpu: true"),
    "deepspeed": ({"distributed_type": "DEEPSPEED"}, "distributed_type is DEEPSPEED"),
    "no count": ({"num_processes": 0}, "num_processes is 0. Set"),
    "a text as count": ({"num_processes": "two"}, "num_processes is 'two'. Set"),
    "two machines": ({"num_machines": 2}, "num_machines is 2, but a run trains on one machine"),
    "tensor parallel": ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "parallelism_config splits"),
    "an unknown sharding key": ({"fsdp_config": {"fsdp_versoin": 2}}, "fsdp_config has unknown keys: fsdp_versoin"),
    "FSDP 1": ({"distributed_type": "FSDP"}, "FSDP 1 cannot .* Set fsdp_version: 2"),
    "checkpointing": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_activation_checkpointing": True}},
        "gradient_checkpointing: true",
    ),
    "a whole state dict": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}},
        "gathers the whole model",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused(name: str, tmp_path: Path) -> None:
    changes, message = WRONG[name]
    path = tmp_path / "wrong.yaml"
    config = yaml.safe_load((ROOT / "configs/cpu.yaml").read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ConfigError, match=message) as caught:
        read_processes(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("content", [None, "a: [", "- a list\n", "just text", ""])
def test_a_file_that_is_no_configuration_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"no accelerate configuration that can be used \(.*accelerate config"):
        read_processes(path)


def test_the_shipped_files_are_accepted(files: dict[str, str]) -> None:
    assert read_processes(ROOT / "configs/fsdp.yaml") == 8
    assert check_processes(Path(files["cpu"]), device="cpu") == 2


def test_the_70b_example_trains_the_papers_batch_on_its_gpus() -> None:
    config = load_config(ROOT / "configs/llama3_70b.yaml").config
    assert config.distill.accelerate == str(ROOT / "configs/fsdp.yaml")
    processes = read_processes(Path(config.distill.accelerate))
    assert processes == config.engine.workers * config.engine.tensor_parallel_size == 8
    assert processes * config.distill.per_device_train_batch_size == 8


def test_what_this_machine_lacks_is_refused(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"accelerate does not shard on CPUs"):
        check_processes(Path(files["fsdp"]), device="cpu")
    with pytest.raises(ConfigError, match=r"use_cpu is false, but this run is on the CPU"):
        check_processes(ROOT / "configs/fsdp.yaml", device="cpu")
    monkeypatch.setattr("tuneshift.launch.pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # a machine with GPUs cannot be had here
    with pytest.raises(ConfigError, match=r"num_processes is 8, but 4 CUDA devices are visible"):
        check_processes(ROOT / "configs/fsdp.yaml", device="cuda")
    with pytest.raises(ConfigError, match=r"use_cpu is true, but this run is on CUDA"):
        check_processes(Path(files["cpu"]), device="cuda")


# The whole command


def test_a_transfer_trains_in_two_processes(
    tiny: Tiny, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(Path(files["cpu"]).read_text())
    config = write_project(tmp_path, tiny, distill={"accelerate": str(path)})
    run = tmp_path / "run"
    assert run_cli("transfer", str(config), "--run-dir", str(run)) == 3  # random models do not improve
    training = json.loads((run / "training.json").read_text())
    assert training["processes"] == 2
    assert training["steps"] == 2 * 2  # twelve pairs, eight a step, two epochs
    assert not (run / "checkpoints").exists()
    assert "in 2 processes" in (run / "report.md").read_text()
    capsys.readouterr()
    assert run_cli("plan", str(config), "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["training_steps"] == 2 * 2
    path.unlink()  # a trained target is evaluated on any machine
    items = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a b", "reference": "c"}])
    assert run_cli("evaluate", str(run), "--set", f"evaluation.data={items}") == 3


def test_a_wrong_file_is_refused_before_anything_is_made(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_project(tmp_path, tiny, distill={"accelerate": "none.yaml"})
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 2
    assert f"{tmp_path / 'none.yaml'}: no accelerate configuration" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_with_another_number_of_processes(
    tiny: Tiny, files: dict[str, str], tmp_path: Path
) -> None:
    from tuneshift.preflight import read_inputs

    path = tmp_path / "accelerate.yaml"
    config = write_project(tmp_path, tiny, distill={"accelerate": str(path)})
    digests = []
    for text, processes in (("", 2), ("# a word\n", 2), ("", 3)):
        content = yaml.safe_load(Path(files["cpu"]).read_text()) | {"num_processes": processes}
        path.write_text(text + yaml.safe_dump(content))
        digests.append(read_inputs(load_config(config).config, folder=tmp_path).digests)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.real
def test_a_real_target_is_trained_in_shards(files: dict[str, str], tmp_path: Path) -> None:
    settings = TrainingSettings(
        str(prepare_models() / "SmolLM2-135M-Instruct"),
        lora_dropout=0.0,
        num_train_epochs=3,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        load=LoadOptions(device="cpu", dtype="bfloat16"),
    )
    alone = train(tmp_path / "alone", settings)
    sharded = train_in_two(tmp_path / "sharded", settings, "fsdp", files["fsdp"])
    assert sharded.steps == alone.steps
    assert sharded.losses[-1] < 0.9 * sharded.losses[0]
    assert sharded.losses == pytest.approx(alone.losses, rel=0.02)  # bf16 rounds otherwise in another batch
    assert set(adapter(tmp_path / "sharded")) == set(adapter(tmp_path / "alone"))
