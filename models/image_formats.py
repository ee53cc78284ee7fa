"""Formats of images that are read, to train and to serve; `http/images.py` recognises them."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
"""Pillow's names."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""How names of such files end."""
