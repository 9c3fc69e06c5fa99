"""Artifacts on disk: strict reading, atomic writing, manifests and the work folder.

Nothing is imported here, so that reading a manifest does not load torch.
"""
