"""The stages: functions from artifacts on disk to an artifact on disk."""
