"""Draw docs/roofline.svg: how far scoring, decoding and training stand from what this processor can do.

    python benchmarks/roofline.py [RESULT.json ...] [--output docs/roofline.svg]

Reads results of scoring.py, decode.py and training.py, by default those in benchmarks/results. The roofs are the
fastest product and the fastest read that any of them measured. The horizontal axis is operations per byte that must be
read at least: a batch's weights once, for decoding the keys and values too. Points below a roof lose time elsewhere.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
# Okabe and Ito's colours, told apart by colour-blind readers; shapes repeat what they say. All read on light and dark.
KINDS = {
    "scoring": ("o", "#0072B2"),
    "scoring, compiled": ("D", "#56B4E9"),
    "decoding": ("s", "#D55E00"),
    "training": ("^", "#009E73"),
}
INK = "#808080"  # as far from white as from black


def points(result: dict) -> list[tuple[str, float, float, str]]:
    """Return (kind, operations per byte, operations a second, label) of each of TuneShift's figures in a result."""
    found = []
    for row in result.get("results", []):
        if "operations_per_weight_byte" in row:
            for kind, side in (("scoring", "hf"), ("scoring, compiled", "hf_compiled")):
                label = str(row["requests"])
                found.append((kind, row["operations_per_weight_byte"], row["flops"][side]["median"], label))
        elif "operations_per_byte" in row:
            x, y = row["operations_per_byte"]["hf"], row["flops"]["hf"]["median"]
            found.append(("decoding", x, y, str(row["rows"])))
    if "operations_per_weight_byte" in result:
        label = str(result["batch"])
        found.append(("training", result["operations_per_weight_byte"], result["flops"]["ours"]["median"], label))
    return found


def draw(results: list[dict], output: Path) -> None:
    peak = max(result["gemm_peak_flops"] for result in results)
    read = max(result["memory_bytes_per_second"] for result in results)
    models = sorted({result["model"] for result in results})
    marks = {model: [p for result in results if result["model"] == model for p in points(result)] for model in models}
    everything = [point for points_of_model in marks.values() for point in points_of_model]
    left, right = 0.5, 2 * max(peak / read, *(x for _, x, _, _ in everything))
    bottom = min(y for _, _, y, _ in everything) / 2
    mpl.rcParams.update(
        {
            "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "roofline", "text.color": INK,
            "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
            "axes.facecolor": "none", "figure.facecolor": "none",
        }
    )  # fmt: skip
    figure, panels = plt.subplots(
        1, len(models), figsize=(5.2 * len(models), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, model in zip(panels[0], models, strict=True):
        axes.plot([left, peak / read, right], [left * read, peak, peak], color=INK, linewidth=1.5, zorder=1)
        axes.annotate(f"{peak / 1e12:.1f} TFLOP/s: product of 2048 x 2048", (right, peak), (0, 5),
                      textcoords="offset points", ha="right")  # fmt: skip
        middle = (bottom * peak) ** 0.5
        axes.annotate(f"{read / 1e9:.0f} GB/s: memory", (middle / read, middle), (-8, 0), textcoords="offset points",
                      ha="right")  # fmt: skip
        for kind, (shape, colour) in KINDS.items():
            own = sorted(point[1:] for point in marks[model] if point[0] == kind)
            if own:
                axes.plot([x for x, _, _ in own], [y for _, y, _ in own], shape, color=colour, label=kind, zorder=3)
                for x, y, label in own:
                    above = kind == "scoring, compiled"
                    axes.annotate(label, (x, y), (0, 6 if above else -13), textcoords="offset points", ha="center",
                                  fontsize=8)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, 2 * peak), title=model)
        axes.set_xlabel("operations per byte of weights and cache")
        axes.grid(color=INK, alpha=0.2)
    panels[0][0].set_ylabel("operations a second")
    found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels[0]]
    handles = {label: handle for pairs in found for handle, label in pairs}
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False,
        title="Numbers at the points: requests scored at once, rows decoded at once, pairs of a training step",
    )  # fmt: skip
    figure.savefig(output, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/roofline.svg")
    options = parser.parse_args()
    paths = options.results or sorted((ROOT / "benchmarks/results").glob("*.json"))
    results = [json.loads(path.read_text()) for path in paths]
    results = [result for result in results if "gemm_peak_flops" in result and points(result)]
    if not results:
        parser.error("no result of scoring.py, decode.py or training.py with the figures of this version")
    draw(results, options.output)


if __name__ == "__main__":
    main()
