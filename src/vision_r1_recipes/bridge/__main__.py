"""
Cold-start data by modality bridging `[paper]`.

```shell
python -m vision_r1_recipes.bridge run recipes/bridge.yaml [--key value ...]   # the same command goes on after a stop
python -m vision_r1_recipes.bridge report runs/bridge                          # what each filter did, also meanwhile
python -m vision_r1_recipes.bridge show runs/bridge ID                         # one row through all steps
```
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections.abc import Sequence

from .. import preflight, recipe
from ..progress import stops_kindly
from ..recipe import RecipeError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vision_r1_recipes.bridge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="ask, filter and write").add_argument("recipe")
    commands.add_parser("report", help="report.md and report.html").add_argument("run")
    show = commands.add_parser("show", help="one row through all steps")
    show.add_argument("run")
    show.add_argument("id")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from datasets import disable_progress_bars

    from . import report
    from .run import Run

    disable_progress_bars()

    if args.command == "run":
        run = Run(recipe.merge(recipe.load(args.recipe), recipe.parse_overrides(rest)))
        if run.config.cluster is not None:
            from .cluster import submit

            submit(run)
            return 0
        report.execute(run)
    elif args.command == "report":
        report.report(Run.load(args.run))
    else:
        print(report.show(Run.load(args.run), args.id))
    return 0


if __name__ == "__main__":
    with preflight.kind_errors(), stops_kindly():
        try:
            sys.exit(main())
        except sqlite3.Error as error:
            raise RecipeError(f"the journal can't be read: {error}.") from error
        except OSError as error:
            raise RecipeError(f"{error.filename or 'a file'}: {error.strerror}. What was answered is kept.") from error
