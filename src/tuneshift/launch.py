"""Step 4 in one process or several: then `accelerate launch` starts them, and each calls `tuneshift.distill.distill`.

This module is both ends. `train` starts the launcher and listens; `main` is what each process runs. What
they say comes as JSON lines on the launcher's stdout; all else that they print goes to a log. The launcher's stdin is a
pipe into which nothing is written: its end tells the processes that whoever wanted the training is gone, however it
ended, and they end at once, so that none is left behind with a GPU or a checkpoint half written.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

import tuneshift.errors
from tuneshift.distill import OnStep, Pair, TrainingSettings, TrainingSummary, distill
from tuneshift.errors import ConfigError, TrainingError, UserError
from tuneshift.models import LoadOptions, pick_device

WORKER = ("-m", "tuneshift.launch")
KINDS = ("FSDP", "MULTI_GPU")
SHARDED = "SHARDED_STATE_DICT"
LOG_LINES = 10  # of the log's end in an error: the launcher names there which process ended first, and how
PATIENCE = 30.0  # seconds for the launcher to end once it is told to; a guess


def read_processes(path: Path) -> int:
    """Return how many processes an accelerate configuration file starts.

    Raises:
        ConfigError: the file cannot be read, has unknown keys, or describes what a training cannot do.
    """
    config = _read(path)
    kind = _kind(config)
    sharding = {f"fsdp_{name.removeprefix('fsdp_')}": str(value) for name, value in config.fsdp_config.items()}
    unknown = sorted(sharding.keys() - _launcher_arguments())
    if kind not in KINDS:
        wrong = (
            f"distributed_type is {kind}, but a training runs under {' or '.join(KINDS)}. For several processes on "
            "CPUs set MULTI_GPU with use_cpu: true; for one process leave distill.accelerate out."
        )
    elif unknown:
        wrong = f"fsdp_config has unknown keys: {', '.join(unknown)}. See `accelerate launch --help`."
    elif not isinstance(config.num_processes, int) or config.num_processes < 1:
        wrong = f"num_processes is {config.num_processes!r}. Set how many devices shall train."
    elif config.num_machines != 1:
        wrong = f"num_machines is {config.num_machines}, but a run trains on one machine. Set 1."
    elif config.parallelism_config:
        wrong = "parallelism_config splits more than pairs and weights, which was never tried. Remove it."
    elif kind == "FSDP" and sharding.get("fsdp_version") != "2":
        wrong = "FSDP 1 cannot hold frozen bf16 weights and an fp32 adapter in one unit. Set fsdp_version: 2."
    elif kind == "FSDP" and sharding.get("fsdp_activation_checkpointing", "").lower() == "true":
        wrong = (
            "fsdp_activation_checkpointing draws another dropout when it computes again, and peft cannot save the "
            "adapter under it. Set it to false, and distill.trainer_args to {gradient_checkpointing: true}."
        )
    elif kind == "FSDP" and sharding.get("fsdp_state_dict_type", SHARDED) != SHARDED:
        wrong = f"another fsdp_state_dict_type than {SHARDED} gathers the whole model at every epoch. Set that."
    else:
        return config.num_processes
    raise ConfigError(f"{path}: {wrong}")


def pairs_per_step(settings: TrainingSettings) -> int:
    """Return how many pairs an optimizer step learns from, over all processes."""
    processes = read_processes(Path(settings.accelerate)) if settings.accelerate else 1
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps * processes


def is_sharded(path: Path) -> bool:
    """Tell whether the processes of a file split the weights among them; see `read_processes` for what is raised."""
    return _kind(_read(path)) == "FSDP"


def check_processes(path: Path, *, device: str) -> int:
    """Return what `read_processes` does, once it is clear that this machine has the devices.

    Raises:
        ConfigError: it has not, or the file and the run's device contradict each other.
    """
    import torch

    processes, config = read_processes(path), _read(path)
    on_cpu = pick_device(device).type == "cpu"
    if config.use_cpu != on_cpu:
        here = "the CPU" if on_cpu else "CUDA"
        raise ConfigError(
            f"{path}: use_cpu is {str(config.use_cpu).lower()}, but this run is on {here}. Set use_cpu or run.device."
        )
    if on_cpu and is_sharded(path):
        raise ConfigError(
            f"{path}: accelerate does not shard on CPUs; each process would hold the whole model. Set "
            "distributed_type: MULTI_GPU with use_cpu: true."
        )
    if not on_cpu and processes > torch.cuda.device_count():
        raise ConfigError(
            f"{path}: num_processes is {processes}, but {torch.cuda.device_count()} CUDA devices are visible. Lower it."
        )
    return processes


def _read(path: Path) -> Any:
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        return load_config_from_file(str(path))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{path}: no accelerate configuration that can be used ({why}). Write it with `accelerate config`, or see "
            "configs/fsdp.yaml."
        ) from error


def _kind(config: Any) -> str:
    return str(getattr(config.distributed_type, "value", config.distributed_type))


def _launcher_arguments() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    return {action.dest for action in launch_command_parser()._actions}


def train(
    pairs: Sequence[Pair],
    settings: TrainingSettings,
    *,
    output_dir: Path,
    checkpoint_dir: Path,
    on_step: OnStep = lambda done, total, numbers: None,
) -> TrainingSummary:
    """Do what `tuneshift.distill.distill` does, in the processes of `settings.accelerate` where there are any.

    Raises:
        UserError: what one of the processes raised. TrainingError: they ended in another way.
    """
    if settings.accelerate is None:
        return distill(pairs, settings, output_dir=output_dir, checkpoint_dir=checkpoint_dir, on_step=on_step)
    config, log = _copied_config(Path(settings.accelerate), checkpoint_dir), checkpoint_dir / "log.txt"
    load = replace(settings.load, device=pick_device(settings.load.device).type)  # each process has a device of its own
    job = {
        "pairs": [asdict(pair) for pair in pairs],
        "settings": asdict(replace(settings, accelerate=None, load=load)),
        "output_dir": str(output_dir),
        "checkpoint_dir": str(checkpoint_dir),
    }
    (checkpoint_dir / "job.json").write_text(json.dumps(job), encoding="utf-8")
    port = [] if _read(config).main_process_port else ["--main_process_port", "0"]  # 0: any that is free
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *port, *WORKER]
    with log.open("wb") as errors:
        launcher = subprocess.Popen(
            [*command, str(checkpoint_dir / "job.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is this process's to handle
        )
    try:
        said = _listen(launcher, on_step)
        code = launcher.wait()
    finally:
        _end(launcher)
    if "user_error" in said:
        raise getattr(tuneshift.errors, said["user_error"])(said["message"])
    if code != 0 or "summary" not in said:
        last = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        shown = "\n".join([said["failure"], "...", *last] if "failure" in said else last)
        raise TrainingError(
            f"{settings.accelerate}: the training's processes ended with code {code}:\n{shown}\nThe same command goes "
            f"on from the last whole epoch. All that the processes said is in {log}."
        )
    return TrainingSummary(**said["summary"])


def _copied_config(path: Path, checkpoint_dir: Path) -> Path:
    """Return a copy of the file beside the checkpoints, which are removed if another file's processes wrote them."""
    copied, text = checkpoint_dir / "accelerate.yaml", path.read_text(encoding="utf-8")
    if copied.is_file() and copied.read_text(encoding="utf-8") != text:
        shutil.rmtree(checkpoint_dir)
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    copied.write_text(text, encoding="utf-8")
    return copied


def _listen(launcher: subprocess.Popen[str], on_step: OnStep) -> dict[str, Any]:
    """Pass the steps on as they come, and return all else that the processes said; the first to say it counts."""
    said: dict[str, Any] = {}
    assert launcher.stdout is not None
    for line in launcher.stdout:
        if not line.startswith("{"):
            continue  # the launcher's own words
        message = json.loads(line)
        if "step" in message:
            on_step(*message["step"])
        else:
            said = message | said
    return said


def _end(launcher: subprocess.Popen[str]) -> None:
    """End the launcher and its processes, if they still run."""
    assert launcher.stdin is not None
    launcher.stdin.close()
    if launcher.poll() is None:
        launcher.terminate()  # its own handler ends the processes
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(PATIENCE)
        launcher.kill()
        launcher.wait()
    assert launcher.stdout is not None
    launcher.stdout.close()


def main() -> None:
    """Train as one of the processes of a job file."""
    threading.Thread(target=_end_with_the_pipe, daemon=True).start()
    channel = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no message

    def say(**message: Any) -> None:
        os.write(channel, (json.dumps(message) + "\n").encode())  # one write, so that two processes' lines do not mix

    import torch
    from accelerate import PartialState

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    settings = job["settings"] | {"load": LoadOptions(**job["settings"]["load"])}
    first = os.environ["RANK"] == "0"
    if settings["load"].device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # so that "cuda" is this process's own from the start
    try:
        summary = distill(
            [Pair(**pair) for pair in job["pairs"]],
            TrainingSettings(**settings),
            output_dir=Path(job["output_dir"]),
            checkpoint_dir=Path(job["checkpoint_dir"]),
            on_step=(lambda *step: say(step=step)) if first else (lambda *step: None),
        )
    except UserError as error:
        say(user_error=type(error).__name__, message=str(error))
        sys.exit(2)
    except Exception:
        say(failure=f"process {os.environ['RANK']}: " + traceback.format_exc(limit=-3).strip()[-3000:])
        raise
    if first:
        say(summary=asdict(summary))
    PartialState().destroy_process_group()


def _end_with_the_pipe() -> None:
    """End this process, whatever it does, when its stdin ends."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
