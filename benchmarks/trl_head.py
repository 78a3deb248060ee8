"""A recipe of ours with TRL's own language-model head, for `train.py --gains`. Arguments: the recipe, then its own."""

import runpy
import sys

import posttrain.policy
from posttrain.launch import recipe_path

posttrain.policy.use_dense_lm_head = lambda: False
recipe = sys.argv.pop(1)
runpy.run_path(str(recipe_path(recipe)), run_name="__main__")
