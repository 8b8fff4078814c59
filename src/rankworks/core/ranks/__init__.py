"""How rank changes: the contract of schedules, the surgery they all use, and what several of them score and cut by."""
