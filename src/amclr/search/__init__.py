"""An index of images: built in parts, brought up to date, searched."""
