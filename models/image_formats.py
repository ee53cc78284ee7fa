"""Formats of images that are read, to train and to serve.

Another one needs its first bytes and its size in `_recognise` of `service/http/images.py`, and what
memory decoding it takes in `encoded` there.
"""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
"""Pillow's names."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""How names of such files end."""
