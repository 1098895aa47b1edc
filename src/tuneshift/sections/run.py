"""The configuration's `run`: where and how the run happens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tuneshift.sections.base import PathText, Section


class RunSection(Section):
    """Where and how the run happens."""

    dir: PathText | None = Field(
        None, description="Run directory; null: runs/<name of the YAML file> in the current folder."
    )
    seed: int = Field(0, ge=0, description="Seed from which every random choice is derived.")
    device: str = Field("auto", description="Torch device; `auto` is the first CUDA device, else the CPU.")
    dtype: str = Field(
        "auto", description="Weights' dtype; `auto` is bfloat16 where the hardware has it, else float32."
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (),
        description="Experiment trackers that get the run's numbers while it goes on, never its texts, settings or "
        "files (docs/trackers.md); none by default, since some send them to their maker's servers.",
    )
    trust_remote_code: bool = Field(False, description="Let a model repository's own Python code run.")
    compile: bool = Field(
        False,
        description="Score with compiled layers: quicker once they are compiled. A CPU needs a C++ compiler.",
    )
