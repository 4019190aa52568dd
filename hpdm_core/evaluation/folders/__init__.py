"""Folders of videos: which clips are taken from them, and how they are read."""
