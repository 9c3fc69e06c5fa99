"""How each command's outcome is shown: a short table for people, or one JSON object."""
