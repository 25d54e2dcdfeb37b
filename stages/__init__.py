"""Stages of the pipeline, by topic. `stages.all` imports them all; a stage can also be imported alone.

Torch, transformers and vLLM are imported inside the stages, where they run: a recipe is planned in a moment, on a
machine that may have none of them.
"""
