"""The rooms. `stages.all` lists them all; a room can also be imported alone.

Torch, transformers and vLLM are imported where work begins (inside a stage): a recipe is planned in a
moment, on a machine that may have none of them.
"""
