"""Rewards by a network, one file each, by the names that rewards.py gives them; weights.py is what they share."""
