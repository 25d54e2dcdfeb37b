"""The demo world: everything that the main job needs, made on the spot."""

from pathlib import Path

OVERLAY = Path(__file__).with_name("demo.yaml")  # laid over a recipe by --config, once it lies beside the data
SMALL = Path(__file__).with_name("small.yaml")  # over that, for every method in half an hour
