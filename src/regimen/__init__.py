"""Regimen: multi-task reinforcement learning and reward-driven post-training on one loop.

Collect, judge, credit, learn, adapt: on language, image and control policies alike.
"""

__version__ = "0.1.0"
