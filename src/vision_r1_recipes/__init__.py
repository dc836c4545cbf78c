"""Vision-R1 as a TRL recipe repository."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .configs import VisionGRPOConfig, VisionSFTConfig
    from .ptst import PTSTCallback, Stage
    from .rewards import accuracy_reward, format_reward, hfrrf
    from .trainers import VisionGRPOTrainer, VisionSFTTrainer

_HOME = {
    "VisionGRPOConfig": "configs",
    "VisionSFTConfig": "configs",
    "PTSTCallback": "ptst",
    "Stage": "ptst",
    "accuracy_reward": "rewards",
    "format_reward": "rewards",
    "hfrrf": "rewards",
    "VisionGRPOTrainer": "trainers",
    "VisionSFTTrainer": "trainers",
}

__all__ = [
    "PTSTCallback",
    "Stage",
    "VisionGRPOConfig",
    "VisionGRPOTrainer",
    "VisionSFTConfig",
    "VisionSFTTrainer",
    "accuracy_reward",
    "format_reward",
    "hfrrf",
]


def __getattr__(name: str):
    # Lazy, so that `import vision_r1_recipes.rewards` costs neither torch nor trl.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
