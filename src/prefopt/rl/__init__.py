"""Reinforcement learning: rollouts, advantages, PPO and RLOO."""
