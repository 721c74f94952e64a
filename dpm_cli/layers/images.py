"""The shape of one image."""

Shape = tuple[int, int, int]  # channels, height, width
