"""A recipe without one of our replacements, for `train.py --gains`: `upstream.py head|lora sft|dpo|reward OPTIONS`."""

import runpy
import sys

import posttrain.models.cpu.lm_head
import posttrain.models.cpu.lora
from posttrain.launch import recipe_path

part, recipe = sys.argv[1:3]
del sys.argv[1:3]
module, name = {
    "head": (posttrain.models.cpu.lm_head, "use_dense_lm_head"),
    "lora": (posttrain.models.cpu.lora, "use_accumulated_lora"),
}[part]
setattr(module, name, lambda: None)
runpy.run_path(str(recipe_path(recipe)), run_name="__main__")
