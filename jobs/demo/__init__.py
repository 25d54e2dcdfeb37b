"""Data, gold reward and configs of `winnow demo`."""

from pathlib import Path

OVERLAY = Path(__file__).with_name("demo.yaml")  # laid over a recipe by --config, once it lies beside the data
SMALL = Path(__file__).with_name("small.yaml")  # over that, for every method in half an hour
