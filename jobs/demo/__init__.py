"""Data, rewards and configs of `winnow demo`."""

from pathlib import Path

FOLDER = Path(__file__).parent
OVERLAY = FOLDER / "demo.yaml"  # laid over a recipe by --config, once it lies beside the data
SMALL = FOLDER / "small.yaml"  # over that, for every method in half an hour
REAL = FOLDER / "real.yaml"  # the config of --real, which names the next two
QUESTIONS, REWARD = FOLDER / "questions.jsonl", FOLDER / "reward.py"
