"""A recipe on several processes, one of which goes wrong: `rank_that.py HOW RECIPE ARGUMENTS`.

dies       rank 1 is killed (SIGKILL) inside its third step, once the second one's checkpoint is whole
seed       rank 1 has another seed
data       rank 1 finds another row in the same file, as on a disk of its own
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    how, recipe, *arguments = sys.argv[1:]
    sys.argv = [recipe, *arguments]
    if os.environ["RANK"] == "1" and how == "seed":
        sys.argv += ["--seed", "7"]
    if os.environ["RANK"] == "1" and how == "data":
        from posttrain.data import rows as data

        read = data.read_rows
        data.read_rows = lambda path: list(read(path))[1:]
    if os.environ["RANK"] == "1" and how == "dies":
        from transformers import Trainer

        step = Trainer.training_step

        def dying(trainer, *args, **options):
            if trainer.state.global_step == 2:
                checkpoints = Path(trainer.args.output_dir)
                while not (checkpoints / "checkpoint-2" / "written_by.json").is_file():
                    time.sleep(0.05)
                (checkpoints.parents[1] / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return step(trainer, *args, **options)

        Trainer.training_step = dying
    runpy.run_path(str(Path(__file__).parents[2] / "recipes" / f"{recipe}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
