"""What each stage adds, and what is lost without it, on the miniature.

    make demo
    python benchmarks/stages.py outputs/demo --limit 500 --steps 300

The first table scores the checkpoint after each stage of the demo. The second trains stage 4 once more for ``--steps``
steps from five starts: after all stages, with stage 1, 2 or 3 left out, and from the bare backbones; the stages between
follow in their order, each as long as its recipe says.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from note import LoadWatch, write_note

from pipelines.cli import quiet_libraries
from pipelines.cluster import start_ray
from pipelines.evaluation.benchmarks import GROUPS
from pipelines.evaluation.run import evaluate
from pipelines.settings import ROOT, ScoreSettings, Settings, TrainSettings
from pipelines.training.run import run_stage

CONFIG = ROOT / "configs/mini.yaml"
LAST = 4
CHAINS: dict[str, tuple[int, ...]] = {
    "all stages": (1, 2, 3, 4),
    "without stage 1": (2, 3, 4),
    "without stage 2": (1, 3, 4),
    "without stage 3": (1, 2, 4),
    "stage 4 alone": (4,),
}


def settings_of(kind: type[Settings], **fields: Any) -> Any:
    loaded = kind.load(CONFIG).model_dump()
    return kind.parse({**loaded, "tracking_uri": "none", "quiet": True, **fields}, "benchmarks/stages.py")


def score(checkpoint: Path, demo: Path, limit: int) -> dict[str, Any]:
    output = demo / "stages" / "scores" / "-".join(checkpoint.relative_to(demo).parts)
    fields = {"checkpoint": str(checkpoint), "data": str(demo / "world"), "output": str(output), "limit": limit}
    return evaluate(settings_of(ScoreSettings, benchmark="miniature", baselines=False, **fields))["benchmarks"]


def train_chain(demo: Path, chain: tuple[int, ...], steps: int) -> Path:
    """Train the stages of a chain one after the other; what the demo has trained the same way is taken from it."""
    start, folder = demo / "backbones", demo / "stages" / "".join(map(str, chain))
    for index, number in enumerate(chain):
        if number != LAST and chain[: index + 1] == tuple(range(1, number + 1)):
            start = demo / f"stage{number}/checkpoint"
            continue
        fields = {"init_from": str(start), "data": str(demo / "shards"), "output": str(folder / f"stage{number}")}
        limit = {"max_steps": steps} if number == LAST else {}
        start = Path(run_stage(settings_of(TrainSettings, **fields, **limit), number)["checkpoint"])
    return start


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    names = GROUPS["miniature"]
    lines = [
        "| | " + " | ".join(name.removeprefix("miniature_") for name in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for title, scores in rows.items():
        cells = [f"{s['value']:.1f} ({s['low']:.1f}–{s['high']:.1f})" for s in (scores[name] for name in names)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of a finished demo")
    parser.add_argument("--limit", type=int, default=500, help="questions per benchmark")
    parser.add_argument("--steps", type=int, default=300, help="steps of stage 4 in the second table; 0 leaves it out")
    options = parser.parse_args()
    demo = options.demo.absolute()
    quiet_libraries()
    watch = LoadWatch()
    with start_ray(settings_of(TrainSettings)):
        starts = {f"after stage {number}": demo / f"stage{number}/checkpoint" for number in range(1, LAST + 1)}
        after = {title: score(checkpoint, demo, options.limit) for title, checkpoint in starts.items()}
        parts = {"After each stage": table(after)}
        if options.steps:
            chains = {
                title: score(train_chain(demo, chain, options.steps), demo, options.limit)
                for title, chain in CHAINS.items()
            }
            parts[f"Stages left out (stage 4: {options.steps} steps)"] = table(chains)
    header = [
        f"{options.limit} questions per benchmark about held-out scenes, per cent with 95% intervals (bootstrap).",
        "Stages 1 and 2 are trained on captions without a question, so they answer every question with one.",
        str(watch),
    ]
    write_note("stages", header, parts)


if __name__ == "__main__":
    main()
