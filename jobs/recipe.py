#!/usr/bin/env python3
"""A whole recipe in one command: fetch, prepare, features where they pay, stages 1 to 4, score, quantize, serve.

    python jobs/recipe.py --config configs/paper.yaml raw=DATA output=outputs/paper
    python jobs/recipe.py --config configs/paper.yaml raw=DATA dry_run=true

dry_run=true prints every command, and what cached and inline features cost. Finished steps are skipped, and an
interrupted one is resumed by the same command.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.cli import config_of, run_main
from pipelines.settings import RecipeSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; the path of result.json, which a dry run does not write, is printed last."""
    settings = RecipeSettings.from_command_line(argv, __doc__)

    def work() -> None:
        from pipelines.recipe import run_recipe

        result = run_recipe(settings, config_of(argv))["result"]
        if not settings.dry_run:
            print(result)

    return run_main(work)


if __name__ == "__main__":
    raise SystemExit(main())
