"""The stages of a chain one after the other, in each process of `accelerate launch ... local.py CHAIN`: one start.

What the cluster's chain is compared with: the same recipes in two processes of one machine.
"""

import runpy
import sys
import time
from pathlib import Path

from posttrain.chain.graph import read_chain, stage_arguments
from posttrain.launch import recipe_path
from posttrain.runs.lineage import is_complete


def main() -> None:
    chain = read_chain(Path(sys.argv[1]))
    chain.output_dir.mkdir(parents=True, exist_ok=True)
    for stage in chain.stages:
        recipe = str(recipe_path(stage.config.recipe))
        sys.argv = [recipe, *stage_arguments(chain, stage)]
        runpy.run_path(recipe, run_name="__main__")
        while not is_complete(chain.run_dir(stage.name)):  # the first process is still closing it
            time.sleep(0.05)


if __name__ == "__main__":
    main()
