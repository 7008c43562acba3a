"""How fast training steps are on this machine."""
