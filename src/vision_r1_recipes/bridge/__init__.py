"""
Cold-start data by modality bridging: an MLLM looks at the picture twice, a text reasoner thinks about what it wrote,
rules filter `[paper]`. `python -m vision_r1_recipes.bridge --help`.
"""

from .steps import STEPS, Generation, Prompts, Rejected, Row, bridge


__all__ = ["STEPS", "Generation", "Prompts", "Rejected", "Row", "bridge"]
