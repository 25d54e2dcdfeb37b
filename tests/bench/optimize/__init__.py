"""Our `optimize` and `reference` beside TRL's `DPOTrainer`: same token ids, same pairs per step, separate processes."""

SHAPES = "512/64/8/7,512/64/8/4,1024/128/8/4,256/256/8/4,64/256/2/1"
